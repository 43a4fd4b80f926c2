"""loss.png."""

from fastgan.files import written_whole
from fastgan.training.records import METRICS, read_metrics


def plot_losses(out):
    """Draw the losses of ``out``/metrics.jsonl, and the discriminator's mean outputs, into ``out``/loss.png."""
    from matplotlib.figure import Figure

    rows = read_metrics(out / METRICS)
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, outputs = figure.subplots(2, 1, sharex=True)
    for axes, lines in (
        (losses, {"loss_d": "discriminator", "loss_g": "generator"}),
        (outputs, {"d_real": "D(real)", "d_fake": "D(fake)"}),
    ):
        for name, label in lines.items():
            axes.plot(steps, [row[name] for row in rows], label=label, linewidth=1)
        axes.legend()
        axes.grid(alpha=0.3)
    losses.set_ylabel("loss")
    outputs.set_ylabel("mean sigmoid of logits")
    outputs.set_ylim(0, 1)
    outputs.set_xlabel("step")
    with written_whole(out / "loss.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
