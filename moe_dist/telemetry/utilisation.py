"""Model FLOP/s utilisation: what training a model needs, over what its devices could do (arXiv 2204.02311, section 4.1)."""

PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "MI300X": 1307.4e12,
    "MI325X": 1307.4e12,
}
"""By a part of the device's name, the first that fits: bfloat16 FLOP/s of dense matrices, from the makers' data sheets."""


def peak_flops(device_name: str, precision: str, configured: float | None = None) -> float | None:
    """FLOP/s of one device; None if not known.

    Args:
        device_name: of torch.cuda.get_device_name, or "cpu".
        configured: telemetry.peak_flops, which wins.
    """
    if configured is not None or precision != "bfloat16":
        return configured
    words = f" {device_name} ".replace("-", " ")
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


def utilisation(flops_per_token: float, tokens_per_second: float, num_devices: int, peak: float | None) -> float | None:
    """The share of the peak of all devices; None if that is not known."""
    return None if peak is None else flops_per_token * tokens_per_second / (num_devices * peak)
