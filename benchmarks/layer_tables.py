"""What benchmarks/layer.py prints."""

NAME_WIDTH = 26
NOT_LAYERS = ("limit", "heaviest", "loop of mm", "bmm", "grouped_mm", "all-to-all", "all-to-all as routed")


def run_line(report: dict) -> str:
    unit, scale = unit_of(report)
    square = report["square_gemm"]
    return (
        f"device: {report['device']}, ranks: {report['ranks']}, threads a rank: {report['threads_per_rank']}, "
        f"{report['dtype']}, {report['load']} load, malloc: {report['malloc']}, {report['rounds']} rounds\n"
        f"square GEMM of {square['size']}: {square['flops_per_second'] / scale:.0f} {unit} a rank"
    )


def unit_of(report: dict) -> tuple[str, float]:
    return ("GFLOP/s", 1e9) if report["device"] == "cpu" else ("TFLOP/s", 1e12)


def table(result: dict, report: dict) -> str:
    """One shape as text."""
    rows, (unit, scale) = result["rows"], unit_of(report)
    bounds = [name for name in ("limit", "heaviest") if name in rows]
    lines = [
        "",
        "{tokens} tokens a rank, H {hidden}, F {ffn}, E {experts}, k {top_k}; ".format(**result["shape"])
        + f"heaviest expert {result['heaviest_expert']:.2f} x mean, heaviest rank {result['heaviest_rank']:.2f} x mean",
        f"limit: GEMMs by {result['gemms']} at {result['gemm_flops_per_second'] / scale:.0f} {unit} a rank",
        f"{'':{NAME_WIDTH}}{'median ms':>10}{'min ms':>9}"
        + "".join(f"{f'x {name}':>11}{'(min)':>7}" for name in bounds)
        + f"{'forward':>10}{'backward':>10} {unit}",
    ]
    for name, row in rows.items():
        line = f"{name:{NAME_WIDTH}}{row['median_ms']:10.1f}{row['min_ms']:9.1f}"
        line += "".join(f"{row[f'median_of_{bound}']:11.2f}{row[f'min_of_{bound}']:7.2f}" for bound in bounds)
        if "all-to-all" not in name:
            line += "".join(f"{row[f'{way}_flops_per_second'] / scale:10.1f}" for way in ("forward", "backward"))
        lines.append(line)
    lines += [f"{name}: left out ({reason})" for name, reason in result["left_out"].items()]
    for name in result["differing"]:
        errors = result["largest_differences"][name]
        wrong = ", ".join(f"{key} by {error:.1e}" for key, error in errors.items() if not error <= report["tolerance"])
        lines.append(f"{name}: DIFFERS from the reference, not timed ({wrong})")
    return "\n".join(lines)


def overview(report: dict) -> str:
    """All shapes in one table of Markdown: times by the bound that the loads have, medians and (minima)."""
    results = report["shapes"]
    bound = "heaviest" if all("heaviest" in result["rows"] for result in results) else "limit"
    shapes = ["{tokens}, {hidden}, {ffn}, {experts}, {top_k}".format(**result["shape"]) for result in results]
    lines = [f"| x {bound}: median (min) | {' | '.join(shapes)} |", "|---" * (1 + len(shapes)) + "|"]
    names = dict.fromkeys(name for result in results for name in result["rows"] if name not in NOT_LAYERS)
    lines += [
        f"| {name} | {' | '.join(_cell(result['rows'].get(name), bound, report) for result in results)} |"
        for name in names
    ]
    return "\n".join(lines)


def _cell(row: dict | None, bound: str, report: dict) -> str:
    if row is None:
        return "-"
    ratios = f"{row[f'median_of_{bound}']:.2f} ({row[f'min_of_{bound}']:.2f})"
    if report["device"] == "cpu":
        return ratios
    unit, scale = unit_of(report)
    forward, backward = (row[f"{way}_flops_per_second"] / scale for way in ("forward", "backward"))
    return f"{ratios}, {forward:.0f} / {backward:.0f} {unit}"
