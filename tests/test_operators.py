"""torch.ops.mallowspo.*: schemas, fake kernels, torch.compile and the limits of differentiation."""

import pytest
import torch

from mallowspo import choices, reference
from mallowspo import functional as F

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES)
ops = torch.ops.mallowspo

SCHEMAS = {
    "token_stats": 4,
    "token_stats_backward": 1,
    "token_stats_tile": 0,
    "token_stats_backward_tile": 0,
    "advise_huge_pages": 0,
    "preference_loss": 4,
    "mallows_log_prob": 2,
}


def result_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_and_labels(dtype=torch.float32, rows=(2, 3), vocab=11):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(vocab, rows, generator=generator)
    labels[0] = -100
    return torch.randn(*rows, vocab, generator=generator).to(dtype), labels


def five_logps(dtype=torch.float32, count=4):
    generator = torch.Generator().manual_seed(0)
    logps = [-10 * torch.rand(count, generator=generator) for _ in range(4)]
    return [x.to(dtype) for x in (*logps, torch.rand(count, generator=generator))]


@pytest.mark.parametrize("name, results", SCHEMAS.items())
def test_schemas(name, results):
    schema = getattr(ops, name).default._schema
    assert len(schema.returns) == results and schema.is_mutable == name.endswith("_tile")


@dtypes
def test_opcheck_tiles(dtype):
    logits, labels = logits_and_labels(dtype, rows=(5,), vocab=7)
    state = torch.zeros(4, 5, dtype=result_dtype(dtype))
    torch.library.opcheck(ops.token_stats_tile, (state, logits.clone(), labels, 3, 11, -100, 0.7, True))
    saved = ops.token_stats(logits, labels, -100, 0.7)[1:]
    for grads in ((state[0] + 1, None), (None, state[0] + 1), (state[0] + 1, state[1] + 2)):
        arguments = (logits, *grads, labels, *saved, 3, 11, -100, 0.7)
        torch.library.opcheck(ops.token_stats_backward_tile, arguments)


def test_every_operator_is_tested():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mallowspo::")}
    assert registered == {f"mallowspo::{name}" for name in SCHEMAS}


# --- opcheck: schema, fake kernel and tracing against what the operator does -----------------------------------------


@dtypes
def test_opcheck_token_stats(dtype):
    logits, labels = logits_and_labels(dtype)
    torch.library.opcheck(ops.token_stats, (logits, labels, -100, 0.7))
    torch.library.opcheck(ops.token_stats, (logits.transpose(0, 1), labels.T, -100, 1.0))
    torch.library.opcheck(ops.token_stats, (logits[..., ::2], labels[:].clamp(max=5), -100, 1.0))
    torch.library.opcheck(ops.token_stats, (logits[:0], labels[:0], -100, 1.0))


@dtypes
@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True)])
def test_opcheck_token_stats_backward(dtype, present):
    logits, labels = logits_and_labels(dtype)
    _, *saved = ops.token_stats(logits, labels, -100, 0.7)
    grads = [torch.ones(labels.shape, dtype=result_dtype(dtype)) if here else None for here in present]
    torch.library.opcheck(ops.token_stats_backward, (*grads, logits, labels, *saved, -100, 0.7))
    transposed = [x if x is None else x.transpose(0, 1) for x in (*grads, logits, labels, *saved)]
    torch.library.opcheck(ops.token_stats_backward, (*transposed, -100, 0.7))


@dtypes
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("link", ["bradley-terry", "mallows-theta", "apo-down"])
def test_opcheck_preference_loss(dtype, with_reference, link):
    chosen, rejected, *references, dispersion = five_logps(dtype)
    references = references if with_reference else (None, None)
    dispersion = dispersion if link == "mallows-theta" else None
    options = {"link": link, "label_smoothing": 0.0 if link == "apo-down" else 0.1}
    settings = choices.operator_settings(**choices.PAIR_CHOICES | options)
    arguments = chosen, rejected, *references, dispersion, *settings
    torch.library.opcheck(ops.preference_loss, arguments)


@dtypes
def test_opcheck_mallows_log_prob(dtype):
    margin, dispersion = five_logps(dtype)[::4]
    torch.library.opcheck(ops.mallows_log_prob, (margin, dispersion, 1.0))
    expanded = margin.expand(3, 4), dispersion.expand(3, 4)
    torch.library.opcheck(ops.mallows_log_prob, (*expanded, 0.0))


# --- the operators guard memory whoever calls them -------------------------------------------------------------------


def test_operators_refuse_what_they_could_not_read():
    logits, labels = logits_and_labels()
    logps, *saved = ops.token_stats(logits, labels, -100, 1.0)
    five = five_logps()
    settings = choices.operator_settings(**choices.PAIR_CHOICES)
    bad_calls = {
        "labels must have the shape": (ops.token_stats, (logits, labels[:1], -100, 1.0)),
        "labels must be int64": (ops.token_stats, (logits, labels.int(), -100, 1.0)),
        "empty vocabulary": (ops.token_stats, (logits[..., :0], labels, -100, 1.0)),
        "temperature must be positive": (ops.token_stats, (logits, labels, -100, 0.0)),
        "between 1 and 9 dimensions": (ops.token_stats, (logits[(None,) * 7], labels[(None,) * 7], -100, 1.0)),
        "entropy must be the output": (
            ops.token_stats_backward,
            (logps, None, logits, labels, labels.float().unsqueeze(-1)[..., :0], *saved[1:], -100, 1.0),
        ),
        "entropy must be the output of": (
            ops.token_stats_backward,
            (logps.double(), None, logits, labels, *(x.double() for x in saved), -100, 1.0),
        ),
        "grad_logps has another shape": (
            ops.token_stats_backward,
            (logps[:1], None, logits, labels, *saved, -100, 1.0),
        ),
        "grad_entropy has another dtype": (
            ops.token_stats_backward,
            (None, logps.double(), logits, labels, *saved, -100, 1.0),
        ),
        "rejected_logps has another shape": (ops.preference_loss, (five[0], five[1][:2], *five[2:], *settings)),
        "ref_chosen_logps has another dtype": (
            ops.preference_loss,
            (*five[:2], five[2].double(), *five[3:], *settings),
        ),
        "needs neg_log_dispersion": (ops.preference_loss, (*five[:4], None, *settings)),
        "unknown link 16": (ops.preference_loss, (*five, 16, *settings[1:])),
        "unknown link -1": (ops.preference_loss, (*five, -1, *settings[1:])),
        "unknown divergence -1": (ops.preference_loss, (*five, *settings[:8], -1, *settings[9:])),
        "unknown divergence 2": (ops.preference_loss, (*five, *settings[:8], 2, *settings[9:])),
        "neg_log_dispersion has another shape": (ops.mallows_log_prob, (five[0], five[4][:1], 1.0)),
        "float32, float64, bfloat16 or float16": (ops.mallows_log_prob, (labels, labels, 1.0)),
    }
    for message, (operator, arguments) in bad_calls.items():
        with pytest.raises(RuntimeError, match=message):
            operator(*arguments)


def test_tiles_refuse_what_they_could_not_read_or_write():
    logits, labels = logits_and_labels(rows=(6,))
    logps, *saved = ops.token_stats(logits, labels, -100, 1.0)
    state = torch.zeros(4, 6)

    def forward(state=state, logits=logits, labels=labels, first=0, entries=11):
        ops.token_stats_tile(state, logits.clone(), labels, first, entries, -100, 1.0, False)

    def backward(logits=logits, labels=labels, first=0, entries=11):
        ops.token_stats_backward_tile(logits, logps, None, labels, *saved, first, entries, -100, 1.0)

    for other in (state[:3], torch.zeros(4, 5), state.double(), torch.zeros(6, 4).T):
        with pytest.raises(RuntimeError, match="state must be .4, rows., contiguous"):
            forward(state=other)
    for tile in (forward, backward):
        with pytest.raises(RuntimeError, match="a tile needs contiguous rows"):
            tile(logits=logits.T.contiguous().T)
        for place in ({"first": -1}, {"entries": 10}):
            with pytest.raises(RuntimeError, match="a tile lies inside the vocabulary"):
                tile(**place)
        with pytest.raises(IndexError, match="label 11 .* vocabulary of 11"):
            tile(labels=torch.full_like(labels, 11))
    with pytest.raises(IndexError, match="label 11 .* vocabulary of 11"):
        ops.token_stats_backward(logps, None, logits, torch.full_like(labels, 11), *saved, -100, 1.0)


# --- differentiating twice -------------------------------------------------------------------------------------------


def double_backward_cases():
    logits, labels = logits_and_labels(torch.float64)
    hidden, weight = logits.flatten(0, 1), torch.eye(11, dtype=torch.float64)
    five = five_logps(torch.float64)
    return {
        "token_stats": (lambda x: F.token_stats(x, labels).logps, logits),
        "linear_token_stats": (lambda x: F.linear_token_stats(x, weight, labels.flatten()).entropy, hidden),
        "preference_loss": (
            lambda x: F.preference_loss(x, *five[1:4], neg_log_dispersion=five[4], link="mallows-phi").losses,
            five[0],
        ),
        "mallows_log_prob": (lambda x: F.mallows_log_prob(x, five[4]), five[0]),
    }


@pytest.mark.parametrize("name", double_backward_cases())
def test_a_second_derivative_raises(name):
    function, argument = double_backward_cases()[name]
    loss = function(argument.requires_grad_()).sum()
    torch.autograd.grad(loss, argument, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, argument, create_graph=True)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def every_function(hidden, weight, labels, ref_logps, dispersion, smoothing=1.0):
    """One training step's worth of calls: every function of mallowspo.functional, in a scalar."""
    linear = F.linear_token_stats(hidden, weight, labels, softcap=5.0, chunk_tokens=4)
    whole = F.token_stats(hidden @ weight.T, labels, temperature=0.7)
    chosen, rejected = linear.logps.chunk(2)
    estimate = F.neg_log_dispersion(*whole.entropy.detach().chunk(2), weight.shape[0])
    losses, chosen_rewards, _ = F.preference_loss(
        chosen, rejected, *ref_logps.chunk(2), neg_log_dispersion=estimate, label_smoothing=0.1
    )
    plain = F.preference_loss(chosen, rejected, link="bradley-terry").losses
    errors = -chosen, -rejected, *(-ref_logps).chunk(2)
    images = F.diffusion_preference_loss(*errors, neg_log_dispersion=estimate, beta=0.2).losses
    link = F.mallows_log_prob(chosen - rejected, dispersion, smoothing=smoothing)
    return (losses + plain + images + chosen_rewards).sum() + whole.logps.sum() + linear.entropy.sum() - link.sum()


def bandit_step(hidden, weight, labels, ref_logps, dispersion):
    stats = F.token_stats(hidden @ weight.T, labels)
    logps = *stats.logps.chunk(2), *ref_logps.chunk(2)
    return F.preference_loss(*logps, neg_log_dispersion=dispersion, link="mallows-phi").losses.sum()


def assert_equals_eager(function, compiled, pairs, **options):
    generator = torch.Generator().manual_seed(pairs)
    hidden, weight = (torch.randn(n, 3, generator=generator, requires_grad=True) for n in (2 * pairs, 7))
    labels = torch.randint(7, (2 * pairs,), generator=generator)
    labels[1] = -100
    ref_logps = -10 * torch.rand(2 * pairs, generator=generator)
    dispersion = torch.rand(pairs, generator=generator, requires_grad=True)
    leaves = hidden, weight, dispersion
    eager, actual = (f(hidden, weight, labels, ref_logps, dispersion, **options) for f in (function, compiled))
    torch.testing.assert_close(actual, eager)
    torch.testing.assert_close(torch.autograd.grad(actual, leaves), torch.autograd.grad(eager, leaves))


def test_compile_every_function():
    torch._dynamo.reset()
    compiled = torch.compile(every_function, fullgraph=True, backend="aot_eager")
    assert_equals_eager(every_function, compiled, pairs=5)
    assert_equals_eager(every_function, compiled, pairs=5, smoothing=0.5)


def test_compile_with_inductor():
    torch._dynamo.reset()
    assert_equals_eager(bandit_step, torch.compile(bandit_step, fullgraph=True), pairs=5)


def tiled_heads(hidden, weight, labels, _ref_logps, dispersion):
    """Several tiles and chunks of every kind of head: inductor moves reads of a tensor that an operator changes."""
    total = dispersion.sum()
    for head in (weight, weight.detach()):
        for softcap in (None, 5.0):
            stats = F.linear_token_stats(hidden, head, labels, softcap=softcap, chunk_tokens=4, memory_budget=500)
            total = total + stats.logps.sum() + stats.entropy.square().sum()
            total = total + F.linear_token_stats(hidden, head, labels, softcap=softcap, memory_budget=500).logps.sum()
    return total + F.linear_token_stats(hidden, weight.detach(), labels, low_rank=(hidden, weight)).logps.sum()


def test_compile_tiles_with_inductor():
    torch._dynamo.reset()
    assert_equals_eager(tiled_heads, torch.compile(tiled_heads, fullgraph=True), pairs=5)


def test_compiled_code_leaves_the_logits():
    """Inductor's in-place write would reach them without the error that it is owed."""
    logits, labels = logits_and_labels()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: F.token_stats(x, labels, inplace_backward=True).logps.sum(), fullgraph=True)
    results = []
    for function in (compiled, lambda x: F.token_stats(x, labels).logps.sum()):
        own = logits.detach().clone().requires_grad_()
        shared = own * 1
        other = shared.logsumexp(-1).square().sum()
        results += torch.autograd.grad(function(shared) + other, own)
    torch.testing.assert_close(*results)


def test_one_graph_serves_every_batch_size():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(bandit_step, fullgraph=True, dynamic=True, backend=backend)
    for pairs in (5, 6, 9):
        assert_equals_eager(bandit_step, compiled, pairs)
    assert len(graphs) == 1


@pytest.mark.parametrize("link", reference.TORCH_LINKS)
def test_compile_every_link(link):
    chosen, rejected, *references, dispersion = five_logps()
    dispersion = dispersion if link in reference.DISPERSION_LINKS else None

    def losses(chosen):
        return F.preference_loss(chosen, rejected, *references, neg_log_dispersion=dispersion, link=link).losses

    torch._dynamo.reset()
    compiled = torch.compile(losses, fullgraph=True, backend="aot_eager")
    eager, actual = (f(chosen.requires_grad_()) for f in (losses, compiled))
    assert torch.equal(actual, eager)
    assert torch.equal(*(torch.autograd.grad(x.sum(), chosen)[0] for x in (actual, eager)))


def test_compiled_code_raises_as_eager_code_does():
    logits, labels = logits_and_labels()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, y: F.token_stats(x, y).logps, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="label 11 .* vocabulary of 11"):
        compiled(logits, torch.full_like(labels, 11))
