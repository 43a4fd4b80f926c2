"""One whole update of a GAN: the discriminator on real and fake images, then the generator."""

import copy
import warnings
import weakref
from contextlib import contextmanager

import torch

from fastgan.backend import HOOKS_OF_ALL, PRECISIONS, without_autocast
from fastgan.batch_groups import batch_groups
from fastgan.checks import check_positive
from fastgan.first_order import first_order
from fastgan.fusion import fuse, fused_groups
from fastgan.losses import backward_bce, backward_bce_of_torch
from fastgan.memory_format import default_layout
from fastgan.training.adam import ContiguousAdam, KernelAdam, follow_layouts
from fastgan.training.arguments import (
    check_flags,
    check_images,
    check_learning,
    check_networks,
    check_source,
    checked_betas,
    latent_shape,
)
from fastgan.training.devices import check_precision
from fastgan.training.graph import WARMUP_STEPS, StepGraph
from fastgan.training.one_pass import TRIAL_IMAGES, one_pass_obstacle, stacked, trial_key
from fastgan.training.undo import BeforeStep
from fastgan.training.weights import (
    frozen,
    keep_compilable,
    load_weights,
    parameters_in_both,
    to_channels_last,
    to_contiguous,
    wants_default_layout,
)
from fastgan.weight_copies import WeightCopies

_STATEFUL = ("generator", "discriminator", "optimizer_g", "optimizer_d", "scaler")
_MOST_TRIALS = TRIAL_IMAGES + 1  # of one pass at steps in a row: it is tried for each number of images up to these


class TrainStep:
    """The DCGAN update (Radford et al. 2015) for any generator and discriminator: ``losses = step(real_images)``.

    The discriminator learns on real images and on fake ones, then the generator learns through the updated
    discriminator with the non-saturating loss, −log σ(D(G(z))); Adam for each. One generator forward serves both.
    Latent vectors come from the global random generator of the networks' device, the same ones fused or not.

    Args:
        generator: module from latents (N, latent_dim) to images; it stays where it is (``.to(device)`` comes before).
        discriminator: module from images to logits (no sigmoid), one per image, in any shape; on the same device. The
            first step takes copies of its parameters and of both networks' buffers, for as long as that step runs.
        latent_dim: length of a latent vector, or the shape of one latent: (100, 1, 1) for networks that want
            (N, 100, 1, 1).
        lr: Adam's learning rate, for both networks.
        betas: Adam's two decay rates, in [0, 1).
        precision: "fp32" computes in the dtype of the parameters; "bf16" and "fp16" use autocast, "fp16" with
            gradient scaling. Parameters keep their dtype, and losses are never in half precision.
        fused: pass both networks through ``fastgan.fuse``, in place, and use the fused losses. False trains them as
            they are, with the losses of torch.
        compile: ``torch.compile`` both networks, each on its own; batches then have one fixed shape. torch keeps eight
            forms of a forward for all networks that share it, and refuses more: ``torch._dynamo.reset()`` drops them.
        cuda_graph: on CUDA, capture the whole step, both updates and the drawing of latents included, in one CUDA
            graph after three steps, and replay it from then on. Batches of another shape still run, uncaptured. A
            replay repeats what was captured, what Python decided by chance included: after changing what the networks
            consist of, train() or eval(), or an optimizer's options other than the learning rate, call
            ``forget_graph()``. Without CUDA it has no effect.
        one_pass: run the discriminator's update over [real; fake] in one pass in which each half has its own batch
            statistics: the same numbers as two passes with half the launches, but the activations of both halves are
            alive at once. None: with fused layers. The first step tries on copies, with a few images, whether it really
            gives the same numbers, as do later ones when layers, hooks, modes or settings (numbers and flags among a
            module's attributes) have changed, and where not (a BatchNorm that is not fused, or hooks, say) goes back to
            two passes: see ``one_pass_reason``. What else it cannot see: for a discriminator that goes by other objects
            or by the size of the batch, say False.
        source: where ``step()`` without images takes them from: an object whose ``draw()`` returns the next batch.

    Attributes: ``generator``, ``discriminator`` (the given modules), ``optimizer_g``, ``optimizer_d``, ``scaler``,
    ``lr`` (to read and set), ``one_pass`` and ``one_pass_reason`` (why, in words; known after the first step).

    Raises:
        ValueError, TypeError: an argument that is not allowed, or a precision that the networks' device does not have.
    """

    def __init__(
        self,
        generator,
        discriminator,
        *,
        latent_dim,
        lr=2e-4,
        betas=(0.5, 0.999),
        precision="fp32",
        fused=True,
        compile=False,
        cuda_graph=False,
        one_pass=None,
        source=None,
    ):
        check_networks(generator, discriminator)
        self.latent_shape, self.source = latent_shape(latent_dim), source
        check_positive("lr", lr)
        betas = checked_betas(betas)
        check_flags(fused=fused, compile=compile, cuda_graph=cuda_graph)
        if one_pass is not None:
            check_flags(one_pass=one_pass)
        check_source(source)
        weight, *others = generator.parameters()
        self.device = weight.device
        self.dtype = next((each.dtype for each in (weight, *others) if each.is_floating_point()), weight.dtype)
        check_precision(precision, self.device)
        self.autocast_dtype = None if precision == "fp32" else PRECISIONS[precision]
        # Autocast casts no float64.
        self._image_dtypes = (self.dtype, None if self.dtype == torch.float64 else self.autocast_dtype)

        self.generator, self.discriminator = generator, discriminator
        self._prepare_networks(fused, compile)
        self._backward_bce = backward_bce if fused else backward_bce_of_torch
        self._settle_one_pass(one_pass, fused)
        self._make_optimizers(float(lr), betas, fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        wants_graph = cuda_graph and self.device.type == "cuda"
        self._graph = StepGraph(self._step, self.device) if wants_graph else None

    def _prepare_networks(self, fused, compile):
        networks = (self.generator, self.discriminator)
        for network in networks:
            if fused:
                fuse(network)
            # Convolutions are fastest in this layout, on a CPU too (by 15% on 28×28 images). The first step tries it.
            to_channels_last(network)
        self._layout_tried, self._in_default_layout = False, []
        self._running = self._drawn = None
        self._g, self._d = networks  # as they are called
        if compile:
            if not fused:
                keep_compilable(self.generator)
            # Apart, because one graph with D(fake.detach()) and D(fake) fails in backward (pytorch#91542).
            self._g, self._d = (torch.compile(network, fullgraph=True, dynamic=False) for network in networks)
        self._copies_g, self._copies_d = map(self._weight_copies, networks)

    def _settle_one_pass(self, one_pass, fused):
        self.one_pass, self.one_pass_reason = one_pass, f"one_pass={one_pass}"
        if one_pass is None:
            self.one_pass, self.one_pass_reason = fused, f"fused={fused}: only fused layers take both halves at once"
        self._tried = {}  # number of images → what the discriminator was when one pass was tried with so many
        self._trials = 0  # one after the other, at every step

    def _make_optimizers(self, lr, betas, fused):
        adam, capturable = KernelAdam if fused else ContiguousAdam, self.device.type == "cuda"
        itself = weakref.ref(self)
        optimizers = []
        for network in (self.generator, self.discriminator):
            real = all(parameter.is_floating_point() for parameter in network.parameters())  # or complex
            optimizer = adam(network.parameters(), lr=lr, betas=betas, fused=real, capturable=capturable)
            # A captured step writes to its old averages.
            optimizer.register_load_state_dict_post_hook(lambda _: itself() and itself().forget_graph())
            optimizers.append(optimizer)
        self.optimizer_g, self.optimizer_d = optimizers
        self._lr_tensors = [], []  # of each optimizer, for each of its groups

    def __call__(self, real_images=None):
        """Update both networks once.

        Args:
            real_images: floating (N, C, H, W) in [−1, 1], on the networks' device (see ``fastgan.data.scale``);
                without any, the next batch of `source`.

        Returns:
            dict of detached 0-dim tensors on that device: "loss_d" and "loss_g", and "d_real" and "d_fake", the mean
            of σ(D(x)) over the real and the fake images in the discriminator's update.

        Raises:
            ValueError, TypeError: the images are no floating-point tensor, or there are none and no source either; what
                the source or the generator gives is none; a network of which no parameter learns.
            RuntimeError: within torch.no_grad(), or `cuda_graph`, and the step is one that cannot be captured.
        """
        if real_images is None:
            if self.source is None:
                raise ValueError("real_images are missing, and this TrainStep has no source to draw them from")
        else:
            check_images(real_images, "real_images")
        if self._layout_tried:
            return self._run(real_images)
        check_learning(generator=self.generator, discriminator=self.discriminator)
        return self._try_layout(real_images)

    def _try_layout(self, real_images):
        """The first step, once more where a network does not run in channels_last, with that one in the default layout.

        With the other as it is: compiled code takes it that weights keep their layout.
        """
        before = BeforeStep(self)
        try:
            losses = self._run(real_images)
            self._layout_tried, self._drawn = True, None
            return losses
        except RuntimeError as error:
            if not wants_default_layout(error) or self._running in self._in_default_layout:
                raise
        before.restore()
        self._in_default_layout.append(self._running)
        to_contiguous(self._running)
        for optimizer in (self.optimizer_g, self.optimizer_d):
            follow_layouts(optimizer)
        self._copies_g, self._copies_d = map(self._weight_copies, (self.generator, self.discriminator))
        return self._try_layout(real_images)

    def _run(self, real_images):
        # Somebody's autocast around the step is none of its own, and would cast within backward too.
        with without_autocast(self.device.type), first_order(), self._copies_g.in_use(), self._copies_d.in_use():
            if self._graph is None:
                return self._step(real_images)
            self._keep_lr()
            return self._graph(real_images)

    def _step(self, real_images):
        for optimizer in (self.optimizer_d, self.optimizer_g):  # both now: the memory is wanted for activations
            optimizer.zero_grad(set_to_none=True)
        self._copies_g.refresh()
        self._copies_d.refresh()

        fake_images, loss_d, d_real, d_fake = self._discriminate(real_images)
        self.scaler.step(self.optimizer_d)
        self._copies_d.refresh()

        shared = parameters_in_both(self.optimizer_g, self.optimizer_d)
        for parameter in shared:
            parameter.grad = None  # the discriminator's
        with frozen(self.discriminator, but=shared):  # and in backward, which runs parts of forward again where asked
            fake_logits = self._judge(fake_images)
            if self.generator not in self._in_default_layout:
                self._running = self.generator  # of both that are in this backward, the one that was in none yet
            (loss_g,) = self._backward_bce(fake_logits, (1.0,), self.scaler, means=False)
        self.scaler.step(self.optimizer_g)

        self.scaler.update()
        losses = {"loss_d": loss_d, "loss_g": loss_g, "d_real": d_real, "d_fake": d_fake}
        return {name: value.detach() for name, value in losses.items()}

    def _discriminate(self, real_images):
        """Give the discriminator its gradients; returns the fake images, its loss and both mean probabilities."""
        real_images = self._draw() if real_images is None else real_images
        if real_images.dtype not in self._image_dtypes:  # NumPy's float64, say
            real_images = real_images.to(self.dtype)
        latent = torch.randn(len(real_images), *self.latent_shape, device=self.device, dtype=self.dtype)
        fake_images = self._generate(latent) if self.one_pass else None
        if self.one_pass and self._can_take_one_pass(real_images, fake_images):
            images = stacked(real_images, fake_images.detach())
            del real_images  # a batch that was drawn here is not needed any more
            with batch_groups(2):  # backward, too, runs parts of forward again where somebody has asked for that
                logits = self._judge(images)
                return fake_images, *self._backward_bce(logits, (1.0, 0.0), self.scaler)
        # One after the other, so that the activations of both, and of the generator, are never alive together.
        loss_real, d_real = self._learn_half(real_images, 1.0)
        del real_images
        if fake_images is None:
            fake_images = self._generate(latent)
        loss_fake, d_fake = self._learn_half(fake_images.detach(), 0.0)
        return fake_images, loss_real + loss_fake, d_real, d_fake

    def _draw(self):
        """The next batch of the source; while the layout is tried, the one that the step before could not use."""
        images = self._drawn
        if images is None:
            images = self.source.draw()
            check_images(images, "what source.draw() returns")
            if not self._layout_tried:
                self._drawn = images
        return images

    def _generate(self, latent):
        self._running = self.generator
        with self._autocast():
            images = self._g(latent)
        check_images(images, "what the generator returns")
        return images

    def _judge(self, images):
        self._running = self.discriminator
        with self._autocast():
            return self._d(default_layout(images) if self.discriminator in self._in_default_layout else images)

    def _learn_half(self, images, target):
        if images.dim() == 4:
            images = images.to(memory_format=torch.channels_last)
        return self._backward_bce(self._judge(images), (target,), self.scaler)

    def _weight_copies(self, network):
        wanted = self.device.type == "cuda" and self.autocast_dtype is not None
        return WeightCopies(_fused_convolutions(network) if wanted else (), self.autocast_dtype)

    def _can_take_one_pass(self, real_images, fake_images):
        """Whether one pass does for these images; tries it, if that is not known."""
        if real_images.shape != fake_images.shape:
            return False
        if any(HOOKS_OF_ALL):
            return False  # they are for each call of a layer, and one pass is two calls in one
        images, seen = trial_key(self.discriminator, real_images)
        if self._tried.get(images) == seen:
            self._trials = 0
            return True
        if images == 1 and self._tried:
            return False  # a last batch of one image tells little
        self._trials += 1
        self._running = self.discriminator
        if self.discriminator in self._in_default_layout:
            real_images, fake_images = default_layout(real_images), default_layout(fake_images)
        obstacle = one_pass_obstacle(self.discriminator, real_images, fake_images)
        to_be_captured = self._graph is not None and not self._graph.captured
        # A capture cannot try it, and repeats what ran before.
        most_trials = max(1, WARMUP_STEPS - 1) if to_be_captured else _MOST_TRIALS
        if obstacle is None and self._trials > most_trials:
            obstacle = "its layers or settings change at every step, and trying it each time costs more than it saves"
        self._tried[images] = seen
        if obstacle is not None:
            self.one_pass, self.one_pass_reason = False, obstacle
            warnings.warn(f"the discriminator takes real and fake images in two passes: {obstacle}", stacklevel=2)
        return self.one_pass

    @contextmanager
    def _autocast(self):
        """In the dtype of `precision`. Within somebody's autocast PyTorch keeps casts of weights beyond this one's end,
        and so beyond updates, and in a captured step beyond the end of their memory."""
        if self.autocast_dtype is None:
            yield
            return
        torch.clear_autocast_cache()
        try:
            with torch.autocast(self.device.type, self.autocast_dtype):
                yield
        finally:
            torch.clear_autocast_cache()

    @property
    def lr(self):
        """Adam's learning rate; a new one takes effect from the next step on, captured or not."""
        return float(self.optimizer_g.param_groups[0]["lr"])

    @lr.setter
    def lr(self, lr):
        check_positive("lr", lr)
        for optimizer in (self.optimizer_g, self.optimizer_d):
            for group in optimizer.param_groups:
                group["lr"] = float(lr)

    def _keep_lr(self):
        """Move learning rates that somebody set, a scheduler say, into the tensors that a captured step reads."""
        for optimizer, tensors in zip((self.optimizer_g, self.optimizer_d), self._lr_tensors, strict=True):
            for _ in optimizer.param_groups[len(tensors) :]:
                tensors.append(torch.zeros((), dtype=torch.float32, device=self.device))
            for group, tensor in zip(optimizer.param_groups, tensors, strict=False):
                if group["lr"] is not tensor:
                    tensor.copy_(torch.as_tensor(group["lr"]))
                    group["lr"] = tensor

    def forget_graph(self):
        """Capture the step anew: after a change of the networks or optimizers in kind, which a replay would not see."""
        if self._graph is not None:
            self._graph.forget()

    def state_dict(self):
        """What ``load_state_dict`` needs to go on from here: the state of both networks, both Adams, the scaler."""
        state = {name: getattr(self, name).state_dict() for name in _STATEFUL}
        for name in ("optimizer_g", "optimizer_d"):
            groups = state[name]["param_groups"]
            state[name]["param_groups"] = [{**group, "lr": float(group["lr"])} for group in groups]
        return state

    def load_state_dict(self, state):
        """Go on from a ``state_dict()``; one that was saved on another device, or by unfused networks, will do.

        Raises:
            ValueError: the state is of other networks, or is no state of a TrainStep.
        """
        self.forget_graph()
        before = copy.deepcopy(self.state_dict())
        try:
            self._load(state)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            self._load(before)
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"this is no state of a TrainStep for these networks: {error!r}") from error

    def _load(self, state):
        load_weights(self.generator, state["generator"])
        load_weights(self.discriminator, state["discriminator"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])


def _fused_convolutions(network):
    return [group.modules[0] for group in fused_groups(network).values()]
