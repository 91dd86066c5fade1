"""Tables of the evaluations: beside SAELens's own (docs/peers.md), and what each costs
(evals/README.md). Standard library only."""

from _lines import Line, Results, markdown, newest

SAME = {
    "explained_variance": "ev",
    "explained_variance_legacy": "ev_token_mean",
    "mse": "mse",
    "cossim": "cosine",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "l0": "l0_mean",
    "l1": "l1_mean",
    "ce_loss_without_sae": "ce_clean",
    "ce_loss_with_sae": "ce_sae",
    "ce_loss_with_ablation": "ce_zero",
    "ce_loss_score": "ce_recovered_zero",
    "kl_div_with_sae": "kl_sae",
}
"""SAELens's names, and ours for what is meant alike."""

_WHY = {
    "explained_variance_legacy": "the mean of its own batch, where ours is that of the cache",
    "relative_reconstruction_bias": "the mean of the batches' ratios, where ours is one ratio",
    "ce_loss_with_ablation": "zero at every position, special tokens too, where ours leaves "
    "unmasked positions alone",
    "ce_loss_score": "follows from the loss with zeros",
    "kl_div_with_sae": "a window's last token counts, where ours counts those that the loss has",
}
"""Of what SAELens's number is, by `sae_lens/evals.py` of 6.54.12, where it is another."""


def agreement(results: Results) -> str:
    lines = newest(results.get("agreement", []), "kind", "d_sae", "windows", "batches")
    if not lines:
        return ""
    last = lines[-1]
    count, context = last["windows"]
    versions = last["peer_versions"]
    rows = [
        (
            line["kind"],
            f"`{name}`",
            f"`{ours}`",
            _number(line["ours"].get(ours)),
            _number(line["theirs"][name]),
            _number(line["theirs_in_batches"][name]),
            _number(_their_way(line).get(name)),
            _apart(line, name, ours),
            _WHY.get(name, ""),
        )
        for line in lines
        for name, ours in SAME.items()
    ]
    densities = max(line["density_apart"] for line in lines)
    text = (
        f"SAELens {versions['sae-lens']}, torch {versions['torch']}; {count} windows of {context} "
        f"tokens, whole or in {last['batches']} batches; {last['d_sae']:,} latents. Densities "
        f"of latents differ by {densities:.1g} at most.\n\n"
    )
    columns: tuple[str, ...] = ("kind", "SAELens", "saekit", "saekit's", "SAELens's, one batch")
    columns += (f"in {last['batches']} batches", "by us in its way, in batches")
    return text + markdown((*columns, "least difference", "what SAELens's is"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _their_way(line: Line) -> dict[str, float]:
    """By our code, reckoned as SAELens does; the share won back follows from three of them."""
    own, way = line["ours"], line["their_way_in_batches"]
    ablated = way["ce_loss_with_ablation"]
    score = (ablated - own["ce_sae"]) / (ablated - own["ce_clean"])
    return {**way, "ce_loss_score": score}


def _apart(line: Line, name: str, ours: str) -> str:
    """Of SAELens's numbers from ours, or where the definitions differ from ours in its way."""
    own = line["ours"].get(ours)
    pairs = [(line["theirs"][name], own), (line["theirs_in_batches"][name], own)]
    if (ours_in_its_way := _their_way(line).get(name)) is not None:
        pairs.append((line["theirs_in_batches"][name], ours_in_its_way))
    found = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs if a is not None and b is not None]
    return f"{min(found):.1g}" if found else ""


def _each(line: Line) -> float:
    """Seconds of CPU, or where a GPU did the work of the clock, for one of what is counted."""
    taken = "seconds" if str(line["device"]).startswith("cuda") else "cpu_seconds"
    return float(line[taken]) / float(line["count"])


def cost(results: Results) -> str:
    """Of each evaluation; "growth" is how time grew from the count before, per token: 1 is
    linear."""
    keys = ("case", "count", "device", "gpu", "cpu", "cores", "d_sae")
    lines = newest(results.get("evals", []), *keys)
    lines.sort(key=lambda line: (str(line["device"]), line["case"], line["count"]))
    rows = []
    for before, line in zip([None, *lines], lines, strict=False):
        same = before is not None and before["case"] == line["case"]
        grown = ""
        if before is not None and same and before["device"] == line["device"]:
            each = _each(line) / _each(before)
            grown = f"{each:.2f}"
        on_gpu = str(line["device"]).startswith("cuda")
        rows.append(
            (
                line["case"],
                line["gpu"] if on_gpu else f"{line['cpu']}, {line['cores']} cores",
                f"{line['count']:,} {line['unit']}",
                f"{line['seconds']:,.1f}",
                f"{line['cpu_seconds']:,.1f}",
                f"{line['count'] / line['seconds']:,.0f}",
                grown,
                "" if line["growth_mib"] is None else f"{line['growth_mib']:,.0f}",
                "" if line["gpu_mib"] is None else f"{line['gpu_mib']:,.0f}",
            )
        )
    columns: tuple[str, ...] = ("evaluation", "on", "count", "seconds", "of CPU, all cores")
    columns = (*columns, "a second", "growth", "memory MiB, rise")
    return markdown((*columns, "GPU memory MiB, peak"), rows)
