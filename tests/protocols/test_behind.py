import threading
import time

import pytest

import dynprobe as dp
from dynprobe.errors import RunFolderError
from dynprobe.protocols._behind import Behind
from dynprobe.runs import RunWriter


def test_tasks_run_in_order_in_another_thread():
    seen = []
    with Behind() as behind:
        for number in range(20):
            behind.put(lambda number=number: seen.append((number, threading.current_thread().name)))
    assert [number for number, _ in seen] == list(range(20))
    assert {name for _, name in seen} == {"dynprobe-writer"}
    assert not behind.disk_bound


def test_no_more_than_two_wait():
    going, running = threading.Event(), []
    with Behind() as behind:
        for _ in range(3):  # one runs, two wait
            behind.put(lambda: running.append(going.wait(5)))
        fourth = threading.Thread(target=lambda: behind.put(lambda: None))
        fourth.start()
        fourth.join(0.3)
        assert fourth.is_alive()
        going.set()
        fourth.join(5)
        assert not fourth.is_alive()
    assert running == [True] * 3
    assert behind.waited > 0.2


def test_a_slow_disk_is_said():
    with Behind() as behind:
        for _ in range(5):
            behind.put(lambda: time.sleep(0.6))
        assert behind.disk_bound


def test_the_first_error_is_raised_in_the_thread_that_works_and_nothing_is_written_after_it():
    done = []

    def full():
        raise RunFolderError("no space left")

    def work():
        with Behind() as behind:
            behind.put(full)
            for number in range(10):
                behind.put(lambda number=number: done.append(number))
                time.sleep(0.01)

    with pytest.raises(RunFolderError, match="no space left"):
        work()
    assert done == []


def test_an_error_of_the_last_task_is_not_lost():
    with pytest.raises(RunFolderError, match="no space left"), Behind() as behind:
        behind.put(lambda: (_ for _ in ()).throw(RunFolderError("no space left")))


def test_what_was_computed_is_written_when_the_work_is_interrupted():
    done = []

    def work():
        with Behind() as behind:
            for number in range(3):
                behind.put(lambda number=number: (time.sleep(0.05), done.append(number)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [0, 1, 2]


def test_a_disk_that_fails_in_mid_run_ends_it_and_the_run_goes_on_later(tmp_path, monkeypatch):
    settings = {"limit": 6, "batch_size": 1, "max_new_tokens": 0, "out": tmp_path}
    real, calls = RunWriter.write_batch, []

    def failing(self, number, tables, facts=None):
        calls.append(number)
        if number == 2:
            raise RunFolderError("no space left on device")
        return real(self, number, tables, facts)

    monkeypatch.setattr(RunWriter, "write_batch", failing)
    with pytest.raises(RunFolderError, match="no space left"):
        dp.run("tiny-llama", **settings)
    assert calls == [0, 1, 2]
    monkeypatch.undo()
    (folder,) = tmp_path.glob("*_tiny-llama_*")
    assert dp.open(folder).manifest.finished == [0, 1]
    done = dp.run("tiny-llama", **settings)
    assert done.path == folder
    assert done.manifest.finished == list(range(6))
    assert len(done.samples) == 6
