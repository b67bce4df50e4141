"""The Mallows link in mpmath, straight from its definition, at whatever precision is set: the truth of its tests."""

from mpmath import mp


def exact_g(z, a):
    """The design's formula as it stands."""
    phi, r = mp.exp(-a), abs(z)

    def k(x):
        return x / (1 - phi**x) if x else 1 / a

    return (1 - mp.sign(z)) / 2 + mp.sign(z) * (k(r + 1) - k(r))


def exact_smoothed_g(z, a, smoothing):
    """exact_g, and inside the smoothed interval the odd cubic, found by solving its two conditions."""
    if abs(z) >= smoothing:
        return exact_g(z, a)
    e = mp.mpf(smoothing)
    ends = mp.matrix([exact_g(e, a) - mp.mpf(1) / 2, mp.diff(lambda x: exact_g(x, a), e)])
    c1, c3 = mp.lu_solve(mp.matrix([[e, e**3], [1, 3 * e**2]]), ends)
    return mp.mpf(1) / 2 + c1 * z + c3 * z**3


def exact_log_losing(r, a):
    """log (1 - g(r)) for r > 0 from the design's C(u) = u / (e^u - 1); mpmath's exponents do not overflow."""

    def c(u):
        return u / mp.expm1(u)

    return mp.log((c(a * r) - c(a * (r + 1))) / a)


def exact_link(z, a, smoothing):
    """log g and its derivatives in z and in a, for z != 0 unless smoothed."""

    def log_g(z_, a_):
        if abs(z) < smoothing:
            return mp.log(exact_smoothed_g(z_, a_, smoothing))
        return exact_log_losing(-z_, a_) if z < 0 else mp.log1p(-mp.exp(exact_log_losing(z_, a_)))

    return log_g(z, a), mp.diff(lambda x: log_g(x, a), z), mp.diff(lambda x: log_g(z, x), a)
