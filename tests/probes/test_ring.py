"""States in one buffer: nothing is overwritten before it was copied, and nothing under its owner."""

import ctypes
import gc
from typing import Any

import pytest
import torch

import dynprobe as dp
from dynprobe.errors import UsageError
from dynprobe.probes import Instrument, Where, generate, make_batch, sites_to_read
from dynprobe.probes._generate import Sampling
from dynprobe.probes._ring import CpuStreams, Ring, Ship, streams_of
from dynprobe.testing import tiny_gpt2, tiny_llama

SITES = [("resid_post", 0), ("resid_post", 1)]


class Recorder:
    """Queues that do a copy only when they are made to, and write down in which order things happen.

    Work on the device is a queue: a copy is done when the device gets to it, which is as late as anybody waits.
    """

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.waiting: dict[int, Any] = {}
        self.number = 0

    def mark(self) -> int:
        self.number += 1
        self.log.append(("mark", self.number))
        return self.number

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: int) -> int:
        assert ("mark", after) in self.log
        self.number += 1
        assert source.is_contiguous()
        # An address and no tensor: a queue of a device does not keep what it reads from being used again.
        self.waiting[self.number] = (target, source.data_ptr())
        self.log.append(("copy", self.number, after))
        return self.number

    def _do(self, event: int) -> None:
        for number in sorted(n for n in self.waiting if n <= event):  # a stream works in order
            target, address = self.waiting.pop(number)
            ctypes.memmove(target.data_ptr(), address, target.numel() * target.element_size())

    def hold(self, event: int) -> None:
        self.log.append(("hold", event))
        self._do(event)

    def settle(self, event: int) -> None:
        self.log.append(("settle", event))
        self._do(event)

    def host(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        self.log.append(("host", size))
        return torch.full((size,), torch.nan, dtype=dtype)


def _fill(ring: Ring, value: float, rows: int = 2, columns: int = 3) -> None:
    ring.begin(rows, columns)
    for number, site in enumerate(ring.sites):
        ring.write(site, torch.full((rows, columns, 4), value + number))


def test_a_copy_waits_for_what_was_computed_and_the_ring_for_the_copy() -> None:
    streams = Recorder()
    ring, ship = Ring(SITES, streams), Ship(streams)
    loads = []
    for batch in range(4):
        _fill(ring, 10.0 * batch)
        loads.append(ship.send(ring))
        ring.end()
    taken = [load.take() for load in loads]
    for batch, values in enumerate(taken):
        assert torch.equal(values[1], torch.full((2, 3, 4), 10.0 * batch + 1))
    assert ring.allocated == 1
    kinds = [entry[0] for entry in streams.log]
    assert kinds.count("host") == 2  # both buffers once
    copies = [entry for entry in streams.log if entry[0] == "copy"]
    for _, event, after in copies:
        assert streams.log.index(("mark", after)) < streams.log.index(("copy", event, after))
    # The ring is written a second time only behind the event of its first copy.
    assert streams.log.index(("hold", copies[0][1])) < streams.log.index(copies[1])
    # A pinned buffer is used a third time only after its first load was read out.
    assert streams.log.index(("settle", copies[0][1])) < streams.log.index(copies[2])


def test_without_waiting_the_recorder_would_have_told() -> None:
    """The stand-in is lazy enough: a ring that forgets to hold hands on the values of the next batch."""
    streams = Recorder()
    ring, ship = Ring(SITES, streams), Ship(streams)
    _fill(ring, 1.0)
    load = ship.send(ring)
    ring.end()
    ring.busy_until(None)
    _fill(ring, 7.0)
    assert float(load.take()[0, 0, 0, 0]) == 7.0


def test_a_buffer_that_somebody_holds_is_not_written() -> None:
    ring = Ring(SITES, CpuStreams())
    ring.begin(2, 3)
    part = ring.write(SITES[0], torch.ones(2, 3, 4))[0, 1:]  # a view of a view
    ring.end()
    _fill(ring, 5.0)
    assert torch.equal(part, torch.ones(2, 4))
    assert ring.allocated == 2
    ring.end()
    del part
    gc.collect()
    _fill(ring, 6.0)
    assert ring.allocated == 2
    held = ring.states()[0].numpy()  # an array holds it too
    ring.end()
    _fill(ring, 8.0)
    assert (held == 6.0).all()
    assert ring.allocated == 3


def test_it_grows_with_the_batch_and_is_used_again_for_smaller_ones() -> None:
    ring = Ring(SITES)
    for rows, columns, allocated in ((2, 3, 1), (4, 5, 2), (1, 2, 2), (4, 5, 2), (2, 10, 2), (5, 5, 3)):
        _fill(ring, 1.0, rows, columns)
        assert ring.states().shape == (2, rows, columns, 4)
        ring.end()
        assert ring.allocated == allocated


def test_what_has_no_room_is_refused() -> None:
    ring = Ring(SITES)
    ring.begin(2, 3)
    ring.write(SITES[0], torch.ones(2, 2, 4))
    with pytest.raises(UsageError, match="begin it with more columns"):
        ring.write(SITES[0], torch.ones(2, 2, 4))
    with pytest.raises(UsageError, match="bfloat16"):
        ring.write(SITES[1], torch.ones(2, 2, 4, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match=r"hold \[0, 2\] columns"):
        ring.states()
    with pytest.raises(UsageError, match="named twice"):
        Ring([SITES[0], SITES[0]])


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_an_instrument_with_a_ring_records_what_it_records_without(build: Any) -> None:
    subject = build()
    sites = sites_to_read(subject, Where.parse("layers=all,component=resid_post"))
    ring = Ring(sites)
    for rows in ([[5, 6, 7, 8], [9, 10, 11]], [[1, 2, 3]]):
        plain = dp.capture(subject, rows, where="layers=all,component=resid_post")
        batch = make_batch(subject, rows)
        ring.begin(*batch.mask.shape)
        with torch.no_grad(), Instrument(subject, sites, ring=ring, **batch.rows) as instrument:
            subject.model(**batch.model_inputs(subject))
        instrument.check_fired()
        tape = instrument.tape()
        for depth in plain.states.depths:
            assert torch.equal(tape.states[depth], plain.states[depth])
            assert tape.states[depth].untyped_storage().data_ptr() == ring.states().untyped_storage().data_ptr()
        del tape, instrument
        ring.end()
        gc.collect()


def test_decode_steps_stand_behind_the_prompt() -> None:
    subject = tiny_llama()
    rows, new = [[5, 6, 7, 8], [9, 10, 11, 12]], 4
    sites = sites_to_read(subject, Where.parse("layers=all,component=resid_post"))
    sampling = Sampling(new, stop_at_eos=False)
    tapes = []
    for ring in (None, Ring(sites)):
        batch = make_batch(subject, rows, side="left")
        if ring is not None:
            ring.begin(len(rows), batch.mask.shape[1] + new)
        instrument = Instrument(subject, sites, ring=ring, **batch.rows)
        generate(subject, batch, sampling, instrument)
        tapes.append(instrument.tape())
    for depth in tapes[0].states.depths:
        assert torch.equal(tapes[0].states[depth], tapes[1].states[depth])
    assert ring is not None
    assert torch.equal(ring.states()[-1], tapes[0].states[3])


def test_a_cpu_has_no_streams() -> None:
    assert isinstance(streams_of("cpu"), CpuStreams)
    ring = Ring(SITES)
    _fill(ring, 3.0)
    load = Ship(streams_of("cpu")).send(ring)
    _fill(ring, 4.0)
    assert float(load.take()[0, 0, 0, 0]) == 3.0


def test_columns_that_were_taken_back_are_written_again() -> None:
    ring = Ring(SITES)
    ring.begin(1, 4)
    for value in (1.0, 2.0, 3.0):
        for site in SITES:
            ring.write(site, torch.full((1, 1, 4), value))
    ring.rewind(2)
    for site in SITES:
        ring.write(site, torch.full((1, 1, 4), 9.0))
    assert ring.states()[0, 0, :, 0].tolist() == [1.0, 9.0]


def test_a_ring_is_no_place_for_a_graph_or_for_other_sites() -> None:
    subject = tiny_llama()
    for options, ring in (({"grad": True}, Ring(SITES)), ({}, Ring(SITES[:1]))):
        with pytest.raises(UsageError, match="a ring keeps values"):
            Instrument(subject, SITES, ring=ring, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device() -> None:
    streams = streams_of("cuda")
    ring, ship = Ring(SITES, streams), Ship(streams)
    loads = []
    for batch in range(6):
        ring.begin(64, 128)
        for number, site in enumerate(SITES):
            ring.write(site, torch.full((64, 128, 256), 10.0 * batch + number, device="cuda"))
        loads.append(ship.send(ring))
        ring.end()
    for batch, load in enumerate(loads):
        assert bool((load.take()[1] == 10.0 * batch + 1).all())
