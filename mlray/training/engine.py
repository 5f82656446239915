"""DeepSpeed behind one small class: the only module that imports it.

The same code runs on one CPU process, on gloo workers and on NCCL workers of many nodes. The DeepSpeed
settings are computed here from `Train`, so that every number exists once. Optimiser state goes in and out
as whole named tensors, which makes a checkpoint independent of world size and ZeRO stage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlray.config import Train
from mlray.training.precision import probe_precision

STATE_KEYS = ("master", "exp_avg", "exp_avg_sq")
_BUILD_S, _LOAD_S = 1800.0, 20.0
"""A lock that is older belongs to no one: longest compilation, and longest load of what is compiled."""


def _import_deepspeed() -> Any:
    """Imports DeepSpeed with its accelerator and its folder of compiled operators chosen first."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    import deepspeed  # after the two settings it reads on import

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # An operator for inference that would be compiled, or loaded under a lock file, by every worker: a worker killed
    # at that moment would leave the lock, and all later ones would wait for it for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def build_operators() -> None:
    """Compiles the one C++ operator that is used, Adam on the host for `train.offload`, before workers need it.

    A build that was killed leaves a lock for which every later process would wait for ever: an old one is removed.
    """
    _import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    _remove_stale_locks()
    get_accelerator().create_op_builder("CPUAdamBuilder").load()


def _remove_stale_locks() -> None:
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).rglob("lock"):
        built = any(lock.parent.glob("*.so"))
        if time.time() - lock.stat().st_mtime > (_LOAD_S if built else _BUILD_S):
            lock.unlink(missing_ok=True)


class Engine:
    """A model on a DeepSpeed engine."""

    def __init__(
        self, model: torch.nn.Module, config: Train, accumulation: int, over_batch: bool = False
    ) -> None:
        """With `over_batch` a step is one call of `step`, after the backward passes inside `one_reduction`."""
        deepspeed = _import_deepspeed()
        _connect()
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.precision = probe_precision(config.precision)
        self.accumulation = accumulation
        self._stage = config.zero_stage
        self._offload = config.offload
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.weights = list(model.parameters())
        self.parameters = [parameter for parameter in self.weights if parameter.requires_grad]
        if config.activation_checkpointing:
            inner: Any = model.get_submodule("model")
            inner.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = _optimizer(model, config)
        settings = _settings(config, 1 if over_batch else accumulation, self.precision)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        # Without ZeRO it would copy all gradients to add up those of one worker.
        self._engine.enable_backward_allreduce = self._stage > 0 or self.world_size > 1
        self._clip_at = config.gradient_clipping
        self.device = self._engine.device
        self._allocate_moments()

    def train(self, mode: bool = True) -> None:
        """Turns dropout on or off."""
        self._engine.train(mode)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's output; inputs may lie on the host."""
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        # Without ZeRO there are no fp32 master copies: the weights stay fp32 and autocast computes in bf16.
        autocast = self._stage == 0 and self.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
            output: torch.Tensor = self._engine(**moved)
        return output

    def seed(self, key: tuple[int, int], place: int) -> None:
        """Seeds dropout by (seed, step, micro-batch of the global batch).

        A resumed run, also one with another number of workers, draws what an undisturbed one draws.
        """
        number = place * self.world_size + self.rank
        torch.manual_seed(int(np.random.SeedSequence([*key, number]).generate_state(1)[0]))

    @contextlib.contextmanager
    def one_reduction(self) -> Iterator[None]:
        """Adds up the gradients of all backward passes inside and reduces them over the workers once, at the end."""
        if self._stage > 0:
            with self._engine.coalesce_grad_reduction():
                yield
            return
        self._engine.enable_backward_allreduce = False
        yield
        if self.world_size > 1:
            self._engine.enable_backward_allreduce = True
            self._engine.allreduce_gradients()

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of one micro-batch; DeepSpeed divides by accumulation x world size."""
        self._engine.backward(loss)

    def step(self, rate: float) -> float:
        """Ends a micro-batch; after the last of a step updates the weights and returns the gradient norm, else 0."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return 0.0
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        norm = self._clip() if self._stage == 0 else None
        self._engine.step()
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def _clip(self) -> torch.Tensor:
        """Clips whole gradients and returns their norm before that, which DeepSpeed's own clipping keeps to itself."""
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if self._clip_at > 0:
            torch.nn.utils.clip_grads_with_norm_(trained, self._clip_at, norm)
        return norm

    @property
    def peak_bytes(self) -> int:
        """Most memory that this process has held so far: allocated on its GPU, or resident on a CPU."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def total(self, values: np.ndarray) -> np.ndarray:
        """Sum over the workers (float64); a collective call."""
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """The values of all workers, everywhere; a collective call and a barrier."""
        values: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def state(self) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Parameter after parameter: name -> fp32 master weight and Adam moments, whole, on the host.

        A collective call: every worker must draw all of it. One parameter is held at a time.
        """
        for name, parameter in zip(self._names, self.parameters, strict=True):
            yield name, {key: self._read(parameter, key).detach().cpu().contiguous() for key in STATE_KEYS}

    def load_state(self, read: Callable[[str, tuple[int, ...]], dict[str, torch.Tensor]], steps: int) -> None:
        """Puts `read(name, shape)` of every parameter in place, after `steps` optimiser steps. A collective call."""
        for name, parameter in zip(self._names, self.parameters, strict=True):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            for key, value in read(name, shape).items():
                self._write(parameter, key, value.to(self.device))
        self._refresh_weights()
        for state in self._adam.state.values():
            state["step"] = torch.full_like(state["step"], steps) if torch.is_tensor(state["step"]) else steps

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimiser inside DeepSpeed's wrapper, if there is one."""
        inner: torch.optim.Optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        return inner

    def _allocate_moments(self) -> None:
        """Makes Adam's state exist before the first step, so that it can be loaded and saved at any time."""
        wrapper = self._engine.optimizer
        if self._stage == 3:
            flat = wrapper.fp32_partitioned_groups_flat
        else:
            flat = [parameter for group in self._adam.param_groups for parameter in group["params"]]
        for parameter in flat:
            step = 0 if self._offload else parameter.new_zeros(())  # the fused kernel wants it on the device
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            self._adam.state[parameter] = {"step": step, **moments}
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._lazy_init_hp_params_optimizer_state()

    def _read(self, parameter: Any, key: str) -> torch.Tensor:
        if self._stage == 0:
            whole = parameter.data if key == "master" else self._adam.state[parameter][key]
        elif key == "master":
            whole = deepspeed_utils().safe_get_full_fp32_param(parameter)
        else:
            whole = deepspeed_utils().safe_get_full_optimizer_state(parameter, key)
        shaped: torch.Tensor = whole.float().reshape(getattr(parameter, "ds_shape", parameter.shape))
        return shaped

    def _write(self, parameter: Any, key: str, whole: torch.Tensor) -> None:
        utils = deepspeed_utils()
        if self._stage == 0:
            (parameter.data if key == "master" else self._adam.state[parameter][key]).copy_(whole)
        elif self._stage == 3:  # the whole-tensor setter cannot place a tensor that the workers do not divide
            size = parameter.ds_tensor.numel()
            padded = torch.nn.functional.pad(whole.flatten(), (0, size * self.world_size - whole.numel()))
            local = padded.narrow(0, size * self.rank, size)
            if key == "master":
                utils.safe_set_local_fp32_param(parameter, local)
            else:
                utils.safe_set_local_optimizer_state(parameter, local, key)
        elif key == "master":
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, key)

    def _refresh_weights(self) -> None:
        """Copies the restored master weights into the weights that compute."""
        wrapper = self._engine.optimizer
        if self._stage in {1, 2}:
            wrapper.update_lp_params()
        elif self._stage == 3:
            kept = wrapper.persistent_parameters
            if kept:
                kept[0].partition(kept)
            for group in range(len(wrapper.fp16_partitioned_groups_flat)):
                wrapper._reassign_or_swap_out_partitioned_parameters(group)
            if kept:
                kept[0].all_gather(kept)


def deepspeed_utils() -> Any:
    """DeepSpeed's accessors of partitioned tensors."""
    return _import_deepspeed().utils


def _connect() -> None:
    """Joins the process group that Ray Train (or a test) has set up, or makes one of a single process."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed wants it set; Ray Train and launchers do so
    if torch.distributed.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def _optimizer(model: torch.nn.Module, config: Train) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019); biases, norms (one dimension) and IA3's scales (1 at rest) do not decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = [p for name, p in trained if p.ndim <= 1 or ".ia3_l." in name]
    others = [p for name, p in trained if p.ndim > 1 and ".ia3_l." not in name]
    groups = [{"params": others, "weight_decay": config.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    if config.offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        _remove_stale_locks()
        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(
            groups, lr=config.lr, betas=config.adam_betas, eps=config.adam_eps, adamw_mode=True
        )
        return offloaded
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.adam_betas, eps=config.adam_eps, fused=True)


def _settings(config: Train, accumulation: int, precision: str) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.gradient_clipping
        if config.zero_stage
        else 0.0,  # `Engine._clip` clips without ZeRO
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16" and config.zero_stage > 0},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
