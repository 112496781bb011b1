"""The trace that is sent gives the numbers of the package, here, in the dry run, and through a stub of NDIF."""

import io
import pickle
import pickletools
import sys
import traceback
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import models
import numpy as np
import pytest
import torch

import dynprobe as dp
from dynprobe import metrics
from dynprobe.errors import ModelError, ModelNotFoundError, OfflineError, UsageError
from dynprobe.metrics._measure_terms import OF_TERMS, measure_terms
from dynprobe.metrics._sent import output_terms
from dynprobe.probes import Batch, Subject, _remote, _server, discover, make_batch
from dynprobe.probes._nnsight import controllers_left, forwards_of, restore
from dynprobe.probes._remote import block_path_of, pushes_of, remote_terms
from dynprobe.probes._server import check_service, without_login
from dynprobe.testing import tiny_causal_lm, tiny_llama

nnsight = pytest.importorskip("nnsight")

NAMES = (
    "gpt2", "llama", "opt", "neox", "qwen2", "mixtral", "gemma2", "gemma3", "bloom", "phi", "falcon", "mistral", "gptj",
    "qwen3", "phi3", "olmo2",
)  # fmt: skip
ROWS = [*models.ROWS, [7, 7]]


_TAKEN: list[Any] = []


def traced_model(model: Any) -> Any:
    """A wrapper that is taken off the model again when the test is over."""
    _TAKEN.append(forwards_of(model))
    return _remote.traced_model(model)


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    while _TAKEN:
        restore(_TAKEN.pop())


def built(name: str) -> Subject:
    return models.subject(name) if name in models.NAMES else discover(tiny_causal_lm(name), name=name)


def targets_of(batch: Batch) -> torch.Tensor:
    goals = torch.full_like(batch.input_ids, -1)
    goals[:, :-1] = torch.where(batch.mask[:, 1:], batch.input_ids[:, 1:], -1)
    return goals


def same(found: metrics.Measurement, wanted: metrics.Measurement) -> None:
    """Every column at every level, with its NaNs and their reasons."""
    assert found.extractor_id == wanted.extractor_id
    assert found.ids == wanted.ids
    for level in ("depth", "token", "profile"):
        mine, theirs = getattr(found, level), getattr(wanted, level)
        assert set(mine) == set(theirs)
        for name, grid in theirs.items():
            np.testing.assert_allclose(mine[name], grid, rtol=1e-6, atol=1e-6, err_msg=f"{level} {name}")
    for mine, theirs in zip(found.sample, wanted.sample, strict=True):
        assert set(mine) == set(theirs)
        for name, result in theirs.items():
            assert mine[name].reason == result.reason, name
            assert (mine[name].coverage, mine[name].n_units, mine[name].n_steps) == pytest.approx(
                (result.coverage, result.n_units, result.n_steps), nan_ok=True
            )
            if isinstance(result.value, str):
                assert mine[name].value == result.value
            else:
                assert float(mine[name]) == pytest.approx(float(result), rel=1e-6, abs=1e-6, nan_ok=True), name
    np.testing.assert_array_equal(found.n_nonfinite, wanted.n_nonfinite)


def wanted_of(subject: Subject, batch: Batch, perturb: Any = None) -> tuple[metrics.Measurement, dict[str, Any]]:
    tape = dp.capture(subject, ROWS, perturb=perturb, logits="all", row_keys=batch.row_keys)
    assert tape.logits is not None
    states = [state.double() for state in tape.states]
    measured = metrics.measure(tape.states, tape.mask, metrics=OF_TERMS, dtype=torch.float64)
    assert states[0].shape == tape.states[0].shape
    return measured, metrics.output_metrics(tape.logits, targets_of(batch))


@pytest.mark.parametrize("name", NAMES)
def test_what_comes_back_gives_the_metrics_of_the_package(name: str) -> None:
    subject = built(name)
    batch = make_batch(subject, ROWS, row_keys=["a", "b", "c", "d"])
    model = traced_model(subject.model)
    path = block_path_of(subject.model)
    assert path == subject.block_path.removesuffix(".*")
    specs = ("alpha=0.3,layers=1", "alpha=0.4,scale=abs,layers=0:2,seed=3,positions=2:")
    perturbs = [dp.Perturb.parse(spec).defaults_filled() for spec in specs]
    arms: list[dict[int, Any]] = [
        {}, pushes_of(perturbs, batch, subject.n_layers, models.DIM if name in models.NAMES else subject.dim or 0),
    ]  # fmt: skip
    for remote in (False, "local"):
        for terms, perturb in zip(
            remote_terms(model, path, batch, targets_of(batch), arms, remote), (None, list(specs)), strict=True
        ):
            wanted, outputs = wanted_of(subject, batch, perturb)
            dtype = terms["dtype"].removeprefix("torch.")
            same(measure_terms(terms, batch.mask, dtype=dtype, dim=terms["dim"]), wanted)
            real = batch.mask.numpy()
            for column, grid in outputs.items():
                np.testing.assert_allclose(terms[column].numpy()[real], grid[real], rtol=1e-5, atol=1e-5)
            assert sum(v.numel() for v in terms.values() if torch.is_tensor(v)) < 4 * real.size * (subject.n_layers + 3)


def test_states_that_cannot_be_measured_have_the_same_reasons() -> None:
    from dynprobe.metrics import _sent

    torch.manual_seed(0)
    states = [torch.randn(3, 9, 8) for _ in range(5)]
    states[2][0, 3] = torch.nan
    states[3][0, 4] = torch.inf
    states[1][1] = 0.0
    states[4][2, 2:5] = states[4][2, 1]
    states[2][2, 6] *= 1e-20
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 7:] = False
    deep = [s.double() for s in states]
    unit = deep[-1] / deep[-1].norm(dim=-1, keepdim=True)
    chord = unit[:, 1:] - unit[:, :-1]
    terms = {
        "norm": torch.stack([_sent.lengths(s) for s in deep]),
        "diff": torch.stack([_sent.lengths(b - a) for a, b in pairwise(deep)]),
        "angle": torch.stack([_sent.angles(a, b) for a, b in pairwise(deep)]),
        "chord": chord.norm(dim=-1), "bend": _sent.angles(chord[:, :-1], chord[:, 1:]),
    }  # fmt: skip
    wanted = metrics.measure(states, mask, metrics=OF_TERMS, dtype=torch.float64)
    assert {r.reason for row in wanted.sample for r in row.values()} - {None}
    same(measure_terms(terms, mask, dtype="float32", dim=8), wanted)
    span = torch.zeros_like(mask)
    span[:, 3:8] = True
    same(
        measure_terms(terms, mask, dtype="float32", dim=8, span=span),
        metrics.measure(states, mask, metrics=OF_TERMS, dtype=torch.float64, span=span),
    )


def test_read_outs_of_odd_logits() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 50) * 5
    logits[0, 1, 3] = torch.inf
    logits[1, 2, 7] = torch.nan
    targets = torch.randint(0, 50, (2, 4))
    targets[0, 3] = -1
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = output_terms(logits.to(dtype), targets)
        for name, grid in metrics.output_metrics(logits.to(dtype), targets).items():
            np.testing.assert_allclose(found[name].double().numpy(), grid, rtol=1e-5, atol=1e-5)


def test_what_is_sent_names_no_module_that_the_far_side_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.intervention.serialization import CustomCloudUnpickler
    from nnsight.schema.request import RequestModel

    sent: list[bytes] = []
    named: list[str] = []
    honest = RequestModel.serialize

    def finding(self: Any, module: str, name: str) -> Any:
        named.append(module)
        return pickle.Unpickler.find_class(self, module, name)

    monkeypatch.setattr(CustomCloudUnpickler, "find_class", finding, raising=False)

    def watched(tracer: Any, compress: bool) -> bytes:
        sent.append(honest(tracer, compress))
        return sent[-1]

    monkeypatch.setattr(RequestModel, "serialize", staticmethod(watched))
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    path_before = list(sys.path)
    remote_terms(traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], "local")
    assert sys.path == path_before
    (blob,) = sent
    assert {name.split(".")[0] for name in named} <= {
        "nnsight",
        "torch",
        "builtins",
        "collections",
        "cloudpickle",
        "types",
    }
    texts = [argument for _, argument, _ in pickletools.genops(blob) if isinstance(argument, str)]
    assert any("def traced_terms" in text for text in texts)
    assert len(blob) < 200_000
    assert controllers_left(subject.model) > 0  # this wrapper stays; it is the caller's model that is traced


class Service:
    """A stub of NDIF: its routes, and a worker that runs what was sent on a model of its own."""

    def __init__(self, model: Any, repo: str = "org/tiny") -> None:
        self.model, self.repo, self.jobs, self.keys = traced_model(model), repo, {}, []
        self.state, self.nnsight, self.failure, self.refusal = "RUNNING", nnsight.__version__, "", ""
        self.polls = self.silent = self.unknown = self.waiting = 0
        self.logins: list[str | None] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.keys.append(request.headers.get("ndif-api-key"))
        self.logins.append(unquote(request.url.userinfo.decode()) or None)
        path = request.url.path
        if path == "/status":
            one = {
                "model_key": f"x:{self.repo}", "repo_id": self.repo, "revision": "main", "deployment_level": "HOT",
                "application_state": self.state,
            }  # fmt: skip
            return httpx.Response(200, json={"deployments": {"a": one}})
        if path == "/env":
            packages = {"nnsight": self.nnsight, "torch": torch.__version__}
            return httpx.Response(200, json={"python_version": "3.12.1 (stub)", "packages": packages})
        if path == "/request" and self.refusal:
            return httpx.Response(401, json={"detail": self.refusal})
        if path == "/request":
            content = request.read()
            self.jobs["job-1"] = self.work(content[content.index(b"\x28\xb5\x2f\xfd") :])
            return httpx.Response(200, json={"id": "job-1", "status": "RECEIVED"})
        if path.startswith("/response/"):
            self.polls += 1
            if self.polls <= self.silent:
                raise httpx.ConnectError("no route", request=request)
            if self.polls <= self.unknown:
                return httpx.Response(404)
            if self.failure:
                return httpx.Response(200, json={"id": "job-1", "status": "ERROR", "description": self.failure})
            if self.polls <= max(1, self.waiting) + self.silent + self.unknown:
                return httpx.Response(200, json={"id": "job-1", "status": "RUNNING"})
            return httpx.Response(200, json={"id": "job-1", "status": "COMPLETED", "data": "http://stub/result"})
        return httpx.Response(200, content=self.jobs["job-1"])

    def work(self, blob: bytes) -> bytes:
        import zstandard
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.tracer import dec, inc

        payload = zstandard.ZstdDecompressor().decompressobj().decompress(blob)
        tracer = RequestModel.deserialize(payload, self.model._remoteable_persistent_objects())
        inc()
        try:
            tracer.execute(tracer.info.code)
        finally:
            dec()
        buffer = io.BytesIO()
        torch.save({"found": tracer.info.frame.f_locals["found"]}, buffer)
        return zstandard.ZstdCompressor().compress(buffer.getvalue())


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    from nnsight.modeling.mixins.remotable import Remotable
    from nnsight.schema.config import CONFIG

    stub = Service(tiny_llama().model)
    honest = httpx.Client

    def client(**settings: Any) -> httpx.Client:
        return honest(transport=httpx.MockTransport(stub), **settings)

    def get(url: str, **settings: Any) -> httpx.Response:
        with client() as one:
            return one.get(url, headers=settings.get("headers"))

    monkeypatch.setattr(httpx, "Client", client)
    monkeypatch.setattr(httpx, "get", get)
    monkeypatch.setattr(Remotable, "_remoteable_model_key", lambda self: "org/tiny")
    monkeypatch.setattr(CONFIG.API, "APIKEY", "sk-secret-0123")
    monkeypatch.setattr(CONFIG.API, "HOST", "http://stub")
    monkeypatch.setattr(_remote, "_PATIENCE", 0.0)
    return stub


def test_the_model_of_the_service_is_measured_and_not_ones_own(service: Service, capfd: Any) -> None:
    theirs = tiny_llama()
    mine = tiny_llama()
    with torch.no_grad():
        for parameter in mine.model.parameters():
            parameter.zero_()
    batch = make_batch(theirs, ROWS, row_keys=["a", "b", "c", "d"])
    push = pushes_of([dp.Perturb.parse("alpha=0.3,layers=1").defaults_filled()], batch, theirs.n_layers, 32)
    found = remote_terms(traced_model(mine.model), "model.layers", batch, targets_of(batch), [{}, push], True)
    assert service.polls == 2
    assert service.keys.count("sk-secret-0123") >= 2
    for terms, perturb in zip(found, (None, "alpha=0.3,layers=1"), strict=True):
        wanted, outputs = wanted_of(theirs, batch, perturb)
        same(measure_terms(terms, batch.mask, dtype="float32", dim=32), wanted)
        real = batch.mask.numpy()
        np.testing.assert_allclose(terms["nll"].numpy()[real], outputs["nll"][real], rtol=1e-5, atol=1e-5)
    assert "sk-secret" not in "".join(capfd.readouterr())


def test_a_job_that_fails_says_what_the_service_said(service: Service) -> None:
    service.failure = "CUDA out of memory"
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    with pytest.raises(ModelError, match=r"job job-1 failed on http://stub: CUDA out of memory"):
        remote_terms(traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], True)


def test_a_job_that_is_not_taken_says_why_and_not_the_key(service: Service) -> None:
    service.refusal = "Invalid API key"
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    with pytest.raises(ModelError, match=r"the service did not take the job: .*Invalid API key") as refused:
        remote_terms(traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], True)
    assert "sk-secret" not in str(refused.value)


def test_a_line_that_fails_now_and_then_is_asked_again_and_not_for_ever(service: Service) -> None:
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    asked = (traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], True)
    service.silent = 4
    assert len(remote_terms(*asked)) == 1
    assert service.polls == 6
    service.polls, service.silent = 0, 99
    with pytest.raises(OfflineError, match=r"http://stub stopped to answer while it had the job job-1.*ConnectError"):
        remote_terms(*asked)
    assert service.polls == 5


def test_a_job_that_vanished_is_not_waited_for_for_ever(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    asked = (traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], True)
    service.unknown = 4  # no status is recorded yet: that is waited for
    assert len(remote_terms(*asked)) == 1
    now = [0.0]

    def later(_: float) -> None:
        now[0] += 50.0

    monkeypatch.setattr(_remote.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(_remote.time, "sleep", later)
    service.polls, service.unknown = 0, 10**6
    with pytest.raises(OfflineError, match=r"http://stub took the job job-1 and has not known it for 200 s \(404\)"):
        remote_terms(*asked)
    assert service.polls == 5
    now[0], service.polls, service.unknown, service.waiting = 0.0, 0, 0, 40  # in a queue for half an hour
    assert len(remote_terms(*asked)) == 1
    assert now[0] == 50.0 * 40


def test_a_login_goes_to_the_server_and_nowhere_else(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_LOGINS", {})
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    host = without_login("http://me:pass%2Fword@stub")
    assert host == "http://stub"
    asked = (traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], host)
    assert check_service("org/tiny", None, host)["host"] == "http://stub"
    assert len(remote_terms(*asked)) == 1
    assert {login for login in service.logins if login} == {"me:pass/word"}
    told = []
    for name, value in (("failure", "no GPU at http://me:pass%2Fword@stub"), ("refusal", "me:pass%2Fword@ is no user")):
        monkeypatch.setattr(service, name, value)
        with pytest.raises(ModelError) as failed:
            remote_terms(*asked)
        told.append(failed)
        monkeypatch.setattr(service, name, "")
    service.polls, service.silent = 0, 99
    with pytest.raises(OfflineError) as silent:
        remote_terms(*asked)
    monkeypatch.setattr(service, "state", "DEPLOYING")
    with pytest.raises(ModelNotFoundError) as absent:
        check_service("org/tiny", None, host)
    monkeypatch.setattr(httpx, "get", lambda url, **_: (_ for _ in ()).throw(httpx.ConnectError(f"refused: {url}")))
    with pytest.raises(OfflineError) as down:
        check_service("org/tiny", None, host)
    for error in (*told, silent, absent, down):
        assert "pass" not in "".join(traceback.format_exception(error.value))


def test_an_answer_that_would_run_something_is_not_read(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    buffer = io.BytesIO()
    torch.save({"found": print}, buffer)
    monkeypatch.setattr(service, "work", lambda _: zstandard.ZstdCompressor().compress(buffer.getvalue()))
    subject = tiny_llama()
    batch = make_batch(subject, ROWS)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        remote_terms(traced_model(subject.model), "model.layers", batch, targets_of(batch), [{}], True)


def test_the_service_is_looked_at_before_anything_is_sent(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.schema.config import CONFIG

    found = check_service("org/tiny", None, True)
    assert found["host"] == "http://stub"
    assert found["versions"]["nnsight"] == nnsight.__version__
    assert check_service("org/tiny", "main", True)["revision"] == "main"
    with pytest.raises(ModelNotFoundError, match=r"org/tinny was asked for.*Did you mean 'org/tiny'.*It runs org/tiny"):
        check_service("org/tinny", None, True)
    with pytest.raises(ModelNotFoundError, match=r"revision main. Type: --revision main"):
        check_service("org/tiny", "v2", True)
    service.state = "DEPLOYING"
    with pytest.raises(ModelNotFoundError, match=r"does not run on http://stub now\. It runs nothing"):
        check_service("org/tiny", None, True)
    service.state, service.nnsight = "RUNNING", "0.7.2"
    with pytest.raises(UsageError, match=r"http://stub runs 0\.7\.2.*pip install 'nnsight==0\.7\.2'"):
        check_service("org/tiny", None, True)
    assert not service.jobs
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(UsageError, match=r"wants an API key; none was found in NDIF_API_KEY.*export NDIF_API_KEY=…"):
        check_service("org/tiny", None, True)

    def down(url: str, **_: Any) -> httpx.Response:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx, "get", down)
    with pytest.raises(OfflineError, match=r"asked http://other:8001 for its models, and it did not answer"):
        check_service("org/tiny", None, "http://other:8001")  # a server of one's own may want no key
    assert CONFIG.API.HOST == "http://stub"


def test_an_empty_login_hides_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "_LOGINS", {})
    assert without_login("http://@stub:8001") == "http://stub:8001"
    assert _server.hidden("ask a@b.org about http://stub:8001") == "ask a@b.org about http://stub:8001"


def test_a_machine_without_nnsight_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dynprobe.probes import _backend

    monkeypatch.setattr(_backend, "nnsight_version", lambda: None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "nnsight"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, as where it is not installed
    with pytest.raises(UsageError, match=r"--remote needs nnsight: pip install 'dynprobe\[nnsight\]'"):
        dp.run("org/tiny", ["a"], backend="nnsight", remote=True, max_new_tokens=0, out=tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        "alpha=0.1,kind=rotate", "alpha=0.1,scale=coordstd", "alpha=0.1,component=attn_out", "alpha=0.1,kind=dropout",
        "alpha=0.1,scale=mad", "alpha=0.1,component=resid_pre,layers=0",
    ],
)  # fmt: skip
def test_writes_that_a_sent_trace_cannot_carry_are_refused(spec: str) -> None:
    subject = tiny_llama()
    with pytest.raises(UsageError, match="--remote writes noise or a direction"):
        pushes_of([dp.Perturb.parse(spec).defaults_filled()], make_batch(subject, ROWS), 3, 32)


def test_a_direction_is_sent_as_hooks_write_it() -> None:
    subject = tiny_llama()
    batch = make_batch(subject, ROWS, row_keys=["a", "b", "c", "d"])
    vector = np.arange(1.0, 33.0)
    for scale in ("relnorm", "abs"):
        perturb = dp.Perturb(alpha=0.3, kind="direction", direction=vector, layers=1, scale=scale).defaults_filled()
        push = pushes_of([perturb], batch, 3, 32)
        (terms,) = remote_terms(traced_model(subject.model), "model.layers", batch, targets_of(batch), [push], False)
        same(measure_terms(terms, batch.mask, dtype="float32", dim=32), wanted_of(subject, batch, perturb)[0])
    with pytest.raises(UsageError, match=r"needs a direction of 16 numbers, and has 32 numbers"):
        pushes_of([perturb], batch, 3, 16)


def test_the_list_of_blocks_is_found_without_weights_or_refused() -> None:
    with torch.device("meta"):
        assert block_path_of(models.build("gpt2")) == "transformer.h"
    two = torch.nn.ModuleDict({name: torch.nn.ModuleList([torch.nn.Tanh()] * 4) for name in ("a", "b")})
    with pytest.raises(ModelError, match=r"several lists of blocks \(a, b\)"):
        block_path_of(two)
    with pytest.raises(ModelError, match="no list of blocks"):
        block_path_of(torch.nn.Linear(2, 2))
