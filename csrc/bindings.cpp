// mallowspo._C: importing it loads the operator library it is linked against. It holds what Python and C++ share: the
// enum of the links and the facts of the build. The kernels themselves are reached through torch.ops.mallowspo.
#include <pybind11/native_enum.h>
#include <pybind11/pybind11.h>

#include "core/preference.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using mallowspo::Divergence, mallowspo::Link;
  py::native_enum<Link>(m, "Link", "enum.IntEnum",
                        "How a margin becomes a log-likelihood; the value is the operators' `link` argument.")
      .value("bradley_terry", Link::bradley_terry)
      .value("mallows_theta", Link::mallows_theta)
      .value("mallows_phi", Link::mallows_phi)
      .value("ipo", Link::ipo)
      .value("mallows_ipo", Link::mallows_ipo)
      .value("hinge", Link::hinge)
      .value("mallows_hinge", Link::mallows_hinge)
      .value("exo", Link::exo)
      .value("mallows_exo", Link::mallows_exo)
      .value("discopop", Link::discopop)
      .value("mallows_discopop", Link::mallows_discopop)
      .value("sppo", Link::sppo)
      .value("nca", Link::nca)
      .value("bco", Link::bco)
      .value("apo_zero", Link::apo_zero)
      .value("apo_down", Link::apo_down)
      .finalize();
  py::native_enum<Divergence>(m, "Divergence", "enum.IntEnum",
                              "What regularises; the value is the operators' `divergence` argument.")
      .value("alpha", Divergence::alpha)
      .value("jensen_shannon", Divergence::jensen_shannon)
      .finalize();
  m.def("uses_dispersion", [](Link link) { return mallowspo::uses_dispersion(link); },
        "Whether the link reads the neg-log dispersion.");
  m.def("has_margin", [](Link link) { return mallowspo::has_margin(link); },
        "Whether the link is a function of one margin.");

  py::dict build;
  build["version"] = MALLOWSPO_VERSION;
  build["compiler"] = MALLOWSPO_COMPILER;
  build["built_with_torch"] = MALLOWSPO_TORCH_VERSION;
  build["cuda"] = MALLOWSPO_CUDA_DECISION;
  build["cuda_architectures"] = MALLOWSPO_CUDA_ARCHITECTURES;
  m.attr("build") = build;
}
