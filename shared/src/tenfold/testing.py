"""The contract that every package's tests run, and what the test suites share.

A package says what to build, and gets all tests below (with the extra `tenfold[testing]`):

    class TestContract(PackageContract):
        cli = "ds_net_plus.cli:app"
        parameter_counts = {"imagenet": 7_676_204}

        def module(self):
            return SupernetModule(...)  # tiny, ready to learn within a few steps

        def data(self):
            return ImageData(...)  # tiny and generated
"""

import atexit
import functools
import inspect
import math
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tenfold.checkpoint import load_state
from tenfold.cli import VERBS, App, load
from tenfold.comparing import differences
from tenfold.data import DataModule
from tenfold.training import LAST, Interrupted, Resumable, StepSeed, resume_path, seed_cpu

CPU = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false")
"""Options of a verb that keep a test on one CPU, whatever the machine has."""


def needs_cuda(test: Any) -> Any:
    """Marks a test as `gpu`, and skips it where there is no CUDA."""
    skipped = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
    return pytest.mark.gpu(skipped(test))


class PackageContract:
    """What every package must be able to do: a test class, subclassed once in each.

    Modules are built with the global generators seeded; all runs on one CPU thread.

    Attributes:
        cli: the package's `tenfold.cli.App`, as "module:attribute".
        modules: methods that build a LightningModule, one for each training stage; the first is
            the app's default model.
        parameter_counts: recipe -> number of parameters of its network, as the paper has it. The
            network is built on the meta device: constructors make it from a configuration, and
            load weights later.
        bad_inputs: rows of (argv, what the message says); they run in the folder that
            `prepare_bad_inputs` has filled.
        steps: on one batch, that must take its loss to `falls_to` of what it was.
        falls_to: see `steps`.
        bf16_tolerance: of the loss under autocast, relative.
        cuda_tolerance: of the loss on a GPU, relative; TF32 and other kernels, and where a loss is
            sampled, another generator.
        fit_options: options of `fit` that make the recipe demo tiny, such as a small data set.
        ddp: options of DistributedDataParallel, such as find_unused_parameters.
    """

    cli: ClassVar[str]
    modules: ClassVar[Sequence[str]] = ("module",)
    parameter_counts: ClassVar[Mapping[str, int]] = {}
    bad_inputs: ClassVar[Sequence[tuple[Sequence[str], str]]] = ()
    steps: ClassVar[int] = 30
    falls_to: ClassVar[float] = 0.8
    bf16_tolerance: ClassVar[float] = 0.02
    cuda_tolerance: ClassVar[float] = 0.01
    fit_options: ClassVar[Sequence[str]] = ()
    ddp: ClassVar[Mapping[str, Any]] = {}

    pytestmark = pytest.mark.filterwarnings("ignore")

    def module(self) -> LightningModule:
        """A tiny module that learns, predicts, and draws no noise in eval mode."""
        raise NotImplementedError

    def data(self) -> DataModule:
        """Tiny data for all modules: an even batch size, three batches or more in an epoch."""
        raise NotImplementedError

    def network(self, module: LightningModule) -> nn.Module:
        """The part of a module that `parameter_counts` counts."""
        return getattr(module, "net", module)

    def exported(self) -> tuple[nn.Module, tuple[Any, ...]] | None:
        """The inference path and example arguments for torch.export, None to leave it out."""
        return None

    def prepare_bad_inputs(self, folder: Path) -> None:
        """Writes the files that `bad_inputs` name."""

    # ------------------------------------------------------------------------------- training

    def test_one_batch_is_learned(self, name: str, tmp_path: Path) -> None:
        """Steps on one batch lower its loss, measured twice under the same random draws."""
        batch, module = self.first_batch(), self.build(name)
        before = self.loss(name, batch, module.state_dict(), tmp_path)
        self.train(module, repeated(batch, self.steps), tmp_path, max_epochs=1)
        after = self.loss(name, batch, module.state_dict(), tmp_path)
        assert after <= self.falls_to * before, (
            f"{self.steps} steps on one batch of {name} took its loss from {before:.4g} to "
            f"{after:.4g}, not to {self.falls_to} of it"
        )

    def test_interrupted_and_resumed(self, name: str, tmp_path: Path) -> None:
        """Ctrl-C in the middle of the first epoch: saved, stopped, resumed to the same bits."""
        cut = SendSignal(signal.SIGINT, epoch=0, batch=1)
        with pytest.raises(Interrupted):
            self.train(self.build(name), self.data(), tmp_path, cut)
        self.assert_resumes(name, tmp_path, "SIGINT")

    def test_killed_and_resumed(self, name: str, tmp_path: Path) -> None:
        """SIGKILL in the middle of the second epoch: some steps are lost, and not a bit."""
        [code] = in_processes(self, [("train_until_killed", name, str(tmp_path))])
        assert code == -signal.SIGKILL, f"the run to be killed ended with {code}, see stderr"
        self.assert_resumes(name, tmp_path, "SIGKILL")

    def test_bf16(self, name: str, tmp_path: Path) -> None:
        """Under bf16 autocast loss and weights are finite and the loss close to float32's."""
        batch, weights = self.first_batch(), self.build(name).state_dict()
        exact = self.loss(name, batch, weights, tmp_path)
        rough = self.loss(name, batch, weights, tmp_path, precision="bf16-mixed")
        assert math.isclose(exact, rough, rel_tol=self.bf16_tolerance), (
            f"the loss of {name} is {exact:.6g} in float32 and {rough:.6g} under bf16 autocast"
        )

    @needs_cuda
    def test_cuda(self, name: str, tmp_path: Path) -> None:
        """On a GPU the loss is the CPU's, in eval mode; under bf16 autocast it is close."""
        batch, weights = self.first_batch(), self.build(name).state_dict()
        exact = self.loss(name, batch, weights, tmp_path, freeze=True)
        for precision, more in (("32-true", 0.0), ("bf16-mixed", self.bf16_tolerance)):
            options: dict[str, Any] = {"accelerator": "gpu", "precision": precision}
            found = self.loss(name, batch, weights, tmp_path, freeze=True, **options)
            assert math.isclose(exact, found, rel_tol=self.cuda_tolerance + more), (
                f"the loss of {name} is {exact:.6g} on the CPU and {found:.6g} on a GPU in "
                f"{precision}"
            )

    def test_two_ranks_do_as_one(self, name: str, tmp_path: Path) -> None:
        """A batch on one rank, or halved over two: the same gradient, then the same predictions.

        In float64 and eval mode: norm statistics are frozen and dropout is off.
        """
        alone = self.step_and_predict(name, tmp_path, 0, 1)
        codes = in_processes(self, [("rank_of_two", name, str(tmp_path), rank) for rank in (0, 1)])
        assert codes == [0, 0], f"the ranks ended with {codes}, see stderr"
        both = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
        for rank, result in enumerate(both):
            wrong = differences(result["gradients"], alone["gradients"], 1e-6)
            assert not wrong, f"gradients of {name} differ on rank {rank}: {wrong}"
        pairs = zip(*(result["predictions"] for result in both), strict=True)
        wrong = differences([item for pair in pairs for item in pair], alone["predictions"], 1e-6)
        assert not wrong, f"predictions of {name} differ on two ranks: {wrong}"

    # ---------------------------------------------------------------------------- checkpoints

    def test_saved_and_loaded(self, name: str) -> None:
        """A checkpoint alone gives the module back: weights and predictions, bit by bit."""
        folder, module = self.finished(name)
        loaded = type(module).load_from_checkpoint(folder / LAST, map_location="cpu")
        wrong = differences(loaded.state_dict(), module.state_dict())
        assert not wrong, f"weights of {name} differ after loading: {wrong}"
        trainer = quiet_trainer(folder, limit_predict_batches=1)
        theirs, mine = (trainer.predict(each, self.data()) for each in (loaded, module))
        wrong = differences(theirs, mine)
        assert not wrong, f"predictions of {name} differ after loading: {wrong}"

    def test_predict_command(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`predict --ckpt FILE` needs nothing else, and leaves files."""
        monkeypatch.chdir(tmp_path)
        checkpoint = self.finished(name)[0] / LAST
        status = self.app.main(["predict", "--ckpt", str(checkpoint), *CPU])
        assert status == 0, f"predict --ckpt ended with status {status}, see stderr"
        assert [*tmp_path.glob("runs/*/*/predict/*")], "predict left no file"

    def test_fit_command(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`fit` alone trains the demo's recipe, and module and data may have seeds of their own."""
        if not self.app.model:
            pytest.skip("the package has no fit")
        monkeypatch.chdir(tmp_path)
        status = self.app.main(["fit", "--trainer.max_steps=2", *CPU, *self.fit_options])
        assert status == 0, f"fit ended with status {status}, see stderr"
        assert [*tmp_path.glob(f"runs/*/*/{LAST}")], "fit left no checkpoint"

    def test_export(self) -> None:
        """What torch.export makes of the inference path computes the same."""
        case = self.exported()
        if case is None:
            pytest.skip("the package names no inference path")
        module, arguments = case
        with torch.no_grad():
            program = torch.export.export(module.eval(), arguments).module()
            wrong = differences(program(*arguments), module(*arguments), 1e-5)
        assert not wrong, f"the exported program computes something else: {wrong}"

    # --------------------------------------------------------------------------- command line

    def test_help_is_quick(self) -> None:
        """`--help` within a second (the best of three) and without torch."""
        module, _, attribute = self.cli.partition(":")
        code = (
            f"import sys; from {module} import {attribute} as app; status = app.main(['--help']); "
            "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            command = [sys.executable, "-c", code]
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            seconds.append(time.perf_counter() - start)
            assert run.returncode == 0, f"--help ended with {run.returncode}: {run.stderr}"
            quiet = run.stderr.strip() == "False"
            hint = "; __init__.py imports public names on first use" if not quiet else ""
            assert quiet, f"--help imports torch{hint}, or says: {run.stderr}"
        assert min(seconds) < 1, f"--help takes {min(seconds):.2f} s"

    def test_recipe(self, recipe: str, tmp_path: Path) -> None:
        """A recipe parses, and its network has the stated number of parameters."""
        from tenfold.verbs import VerbCLI, plan_run

        wanted = self.parameter_counts.get(recipe)
        assert wanted is not None, f"parameter_counts has no number for recipe {recipe}"
        here = {"default_root_dir": tmp_path, "accelerator": "cpu", "devices": 1, "num_nodes": 1}
        here |= {"strategy": "auto", "precision": "32-true"}
        flags = [f"--trainer.{key}={value}" for key, value in here.items()]
        with torch.device("meta"):  # takes no memory, whatever the size
            cli = VerbCLI(self.app, "fit", plan_run(self.app, "fit", ["--config", recipe, *flags]))
        count = sum(p.numel() for p in self.network(cli.model).parameters())
        assert count == wanted, f"recipe {recipe} has {count:,} parameters instead of {wanted:,}"

    def test_bad_input(
        self,
        argv: Sequence[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """What a person gets wrong is told in one line, with exit status 2."""
        monkeypatch.chdir(tmp_path)
        self.prepare_bad_inputs(tmp_path)
        verb = argv[0] in VERBS and not any("nosuch" in word for word in argv)
        status = self.app.main([*argv, *(CPU if verb else ())])
        told = capsys.readouterr().err
        what = f"{' '.join(argv)} ended with status {status} and said:\n{told}"
        assert status == 2, what
        # Lightning may have logged something before
        assert told.count("error: ") == 1, what
        assert "Traceback" not in told, what
        assert told.rstrip().splitlines()[-1].startswith("error: "), what
        assert message in told.partition("error: ")[2], f"{what}\nwithout {message!r}"

    # ------------------------------------------------------------------------------ machinery

    def setup_method(self, method: Any) -> None:
        """One thread, as in the processes: the order of float sums depends on their number."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)

    def teardown_method(self, method: Any) -> None:
        """As many threads as before."""
        torch.set_num_threads(self._threads)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Makes a test of every module, recipe and bad input."""
        if "name" in metafunc.fixturenames:
            metafunc.parametrize("name", self.modules)
        if "recipe" in metafunc.fixturenames:
            metafunc.parametrize("recipe", self.app.recipes())
        if "argv" in metafunc.fixturenames:
            command = "fit" if self.app.model else next(iter(self.app.commands))
            always = [(["nosuch"], "'nosuch'"), ([command, "--nosuch=1"], "nosuch")]
            rows = [*always, *self.bad_inputs]
            metafunc.parametrize(("argv", "message"), rows, ids=[" ".join(row[0]) for row in rows])

    @property
    def app(self) -> App:
        """The package's command line."""
        return load(self.cli)

    def build(self, name: str, seed: int = 0) -> LightningModule:
        """The module of one training stage, freshly initialised."""
        seed_cpu(seed)
        return getattr(self, name)()

    def first_batch(self) -> Any:
        """The first training batch."""
        data = self.data()
        data.prepare_data()
        data.setup("fit")
        return next(iter(data.train_dataloader()))

    def train(
        self, module: LightningModule, data: Any, folder: Path, *extra: Callback, **options: Any
    ) -> Trainer:
        """Trains for two epochs as `fit --resume auto` does; one batch alone is never saved."""
        saving = isinstance(data, DataModule)
        callbacks = [*([Resumable(2, dirpath=folder)] if saving else []), StepSeed(0), *extra]
        trainer = quiet_trainer(folder, **{"callbacks": callbacks, "max_epochs": 2, **options})
        trainer.fit(module, data, ckpt_path=resume_path(folder) if saving else None)
        return trainer

    def loss(
        self,
        name: str,
        batch: Any,
        weights: Mapping[str, Any],
        folder: Path,
        freeze: bool = False,
        **options: Any,
    ) -> float:
        """The training loss of a batch at given weights, always under the same random draws."""
        module, watch = self.build(name), Watch(freeze)
        module.load_state_dict(weights)
        self.train(module, repeated(batch, 1), folder, watch, max_epochs=1, **options)
        bad = [key for key, p in module.named_parameters() if not p.isfinite().all()]
        assert not bad, f"not finite after a step of {name}: {bad}"
        return watch.loss

    @classmethod
    @functools.cache
    def finished(cls, name: str) -> tuple[Path, LightningModule]:
        """The folder and the module of an uninterrupted run, trained once."""
        folder, self = Path(tempfile.mkdtemp()), cls()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        module = self.build(name)
        self.train(module, self.data(), folder)
        return folder, module

    def assert_resumes(self, name: str, folder: Path, what: str) -> None:
        """Resumes from other weights and generator states, and compares all that is saved."""
        reference, module = self.finished(name)
        batches = module.trainer.num_training_batches
        assert batches >= 3, f"data() has {batches} batches in an epoch, not three or more"
        assert resume_path(folder), f"nothing was saved before {what}"
        self.train(self.build(name, seed=1), self.data(), folder)
        resumed, wanted = (load_state(path / LAST) for path in (folder, reference))
        for progress in ("loops", "callbacks"):  # they also count what was done twice
            del resumed[progress], wanted[progress]
        wrong = differences(resumed, wanted)
        assert not wrong, f"{name} resumed after {what} ends in another state: {wrong}"

    def train_until_killed(self, name: str, folder: str) -> None:
        """In a process of its own: ends by SIGKILL."""
        cut = SendSignal(signal.SIGKILL, epoch=1, batch=1)
        self.train(self.build(name), self.data(), Path(folder), cut)

    def rank_of_two(self, name: str, folder: str, rank: int) -> None:
        """In a process of its own: one of two gloo ranks, writes its results to the folder."""
        os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",  # unlike a port, never taken
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=60),
        )
        torch.save(self.step_and_predict(name, Path(folder), rank, 2), Path(folder) / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    def step_and_predict(self, name: str, folder: Path, rank: int, ranks: int) -> dict[str, Any]:
        """Gradients of the first global batch, and this rank's predictions after that step."""
        module, data, watch = self.build(name), self.data(), Watch(freeze=True)
        assert data.batch_size % 2 == 0, f"data() has an odd batch size, {data.batch_size}"
        items = data.batch_size // ranks
        data.batch_size, data.eval_batch_size = items, 1
        options: dict[str, Any] = {"max_epochs": 1, "precision": "64-true"}
        options |= {"limit_train_batches": 1, "limit_val_batches": 0}
        if ranks > 1:
            gloo = DDPStrategy(process_group_backend="gloo", **self.ddp)
            options |= {"strategy": gloo, "devices": ranks, "plugins": [LightningEnvironment()]}
        folder = folder / f"{rank}-of-{ranks}"
        trainer = self.train(module, data, folder, watch, limit_predict_batches=items, **options)
        return {"gradients": watch.gradients, "predictions": trainer.predict(module, data)}


class SendSignal(Callback):
    """Sends this process a signal between a backward pass and the optimizer's step, once."""

    def __init__(self, signum: int, epoch: int, batch: int) -> None:
        self.signum, self.at = signum, (epoch, batch)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whether this is the batch."""
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) == self.at:
            self.at = None
            os.kill(os.getpid(), self.signum)


class Watch(Callback):
    """Keeps the last loss and all gradients; `freeze` trains in eval mode."""

    def __init__(self, freeze: bool = False) -> None:
        self.freeze, self.loss, self.gradients = freeze, math.nan, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any, **__: Any) -> None:
        """Freezes norm statistics and turns dropout off."""
        if self.freeze:
            pl_module.eval()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients, reduced over ranks."""
        named = pl_module.named_parameters()
        self.gradients.append({key: p.grad.clone() for key, p in named if p.grad is not None})

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, *_: Any, **__: Any
    ) -> None:
        """What `training_step` returned, itself or under "loss"."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        assert isinstance(loss, Tensor), "training_step must return its loss, in manual mode too"
        self.loss = float(loss)


def repeated(batch: Any, times: int) -> DataLoader[Any]:
    """A loader that yields one batch several times, as it is."""
    batches: Any = [batch] * times
    return DataLoader(batches, batch_size=None, collate_fn=lambda same: same)


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """A Trainer on one CPU that shows and logs nothing."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": folder}
    return Trainer(**{**dict.fromkeys(quiet, False), **place, **options})


# ------------------------------------------------------------------------------------- processes


def in_processes(contract: PackageContract, calls: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Runs methods of a contract, (name, *arguments) each, in processes; returns exit codes."""
    context = process_context(getattr(contract, "cli", "tenfold").partition(".")[0])
    where = inspect.getfile(type(contract)), type(contract).__name__
    children = [context.Process(target=_call, args=(*where, *call)) for call in calls]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
    hung = [child for child in children if child.is_alive()]
    for child in hung:
        child.kill()
    assert not hung, f"{len(hung)} of {len(children)} processes still ran after two minutes"
    return [child.exitcode for child in children]


def process_context(package: str) -> Any:
    """A context of multiprocessing whose processes can train and need not all import torch anew.

    Args:
        package: whose modules the processes shall have, as far as they are imported here. Where
            processes come from a server, its first caller's alone.
    """
    if can_fork():
        return multiprocessing.get_context("fork")
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    modules = [name for name in sys.modules if name.split(".")[0] == package]
    context.set_forkserver_preload([__name__, *modules])
    return context


def can_fork() -> bool:
    """Whether forks, which save the imports, can train.

    They can while torch has one thread and has used no accelerator, unless an earlier test, such as
    one that traces, has started the threads of autograd, which a fork would lack.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return False
    trial = multiprocessing.get_context("fork").Process(target=_backward)
    trial.start()
    trial.join()
    return trial.exitcode == 0


def _backward() -> None:
    try:
        torch.ones(1, requires_grad=True).sum().backward()
    except RuntimeError:
        os._exit(1)


def _call(file: str, contract: str, method: str, *arguments: Any) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tests = runpy.run_path(file, run_name=Path(file).stem)  # test files need not be importable
    getattr(tests[contract](), method)(*arguments)
