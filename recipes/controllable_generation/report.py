def describe_pairs(*a):
    return {}


def write_report(*a):
    return str([r["domains"]["tweet"]["log_ratios"][:2] for r in a[1]])
