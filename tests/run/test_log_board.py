"""TensorBoard's event file: steps that are all seen, the settings, and that it always shows the rows of `metrics.jsonl`."""

import io
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from tensorboard.summary.writer import event_file_writer

import speedyzero.run.log as log_module
from speedyzero import loop
from speedyzero.envs import describe
from speedyzero.run.observation import newest_frames
from tests.run import log_support
from tests.run.log_support import a_row, board, curve, event_files, file_size_limit, iterations, run_log, said

clock = log_support.clock


def test_steps_are_environment_steps_and_go_on_by_updates_after_the_last_and_none_comes_twice(tmp_path):
    with run_log(tmp_path, total_env_steps=100, total_updates=90) as log:
        # Collecting, two rows of the first sweep, training, learning.
        counts = [(50, 0), (50, 0), (50, 0), (60, 10), (96, 46), (104, 54), (104, 74), (104, 90)]
        for iteration, (env_steps, updates) in enumerate(counts):
            log.row({"env_steps": env_steps, "updates": updates, "iteration": iteration})
    assert [step for step, _ in curve(tmp_path, "updates")] == [50, 51, 52, 60, 96, 104 + 8, 104 + 28, 104 + 44]
    assert [value for _, value in curve(tmp_path, "updates")] == [updates for _, updates in counts]


def test_every_finite_metric_is_shown_and_sps_beside_them(tmp_path, clock):
    with run_log(tmp_path) as log:
        for iteration in (1, 2, 3):
            clock.now += 2
            log.row(a_row(iteration, **{"losses/value_loss": math.nan if iteration == 2 else float(iteration)}))
    assert curve(tmp_path, "losses/value_loss") == [(8, 1.0), (24, 3.0)]
    assert curve(tmp_path, "charts/SPS") == [(8, 4.0), (16, 4.0), (24, 4.0)]


def test_the_settings_are_shown_as_text_and_as_hyperparameters_in_the_same_run(tmp_path):
    with run_log(tmp_path, config={"search": {"simulations": 50, "noise": None}, "lr": 0.2}):
        pass
    shown = board(tmp_path)
    assert b"|simulations|50|" in shown.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert set(shown.summary_metadata) >= {"_hparams_/experiment", "_hparams_/session_start_info"}
    assert all(path.is_file() for path in event_files(tmp_path))


def test_scores_and_a_picture_are_shown_at_their_row_and_are_no_rows(tmp_path):
    result = {"mean": 3.0, "median": 2.0, "lengths": [4, 8], "human_normalised": None}
    picture = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        log.picture("observation", picture)
        log.row(a_row(2))
        shutil.rmtree(tmp_path / "tensorboard")
        log.scores(result)
    shown = {tag: curve(tmp_path, tag) for tag in board(tmp_path).Tags()["scalars"] if tag.startswith("eval/")}
    assert shown == {"eval/episodic_return": [(16, 3.0)], "eval/episodic_return_median": [(16, 2.0)], "eval/episodic_length": [(16, 6.0)]}
    (image,) = board(tmp_path).Images("observation")
    assert image.step == 8
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), picture)
    assert iterations(tmp_path) == [1, 2]


def frames_of(gif: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(gif)) as shown:
        return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(shown)])


@pytest.mark.parametrize("channels", [1, 3])
def test_a_video_is_shown_frame_by_frame_and_again_in_an_event_file_that_begins_again(tmp_path, channels):
    frames = np.random.default_rng(0).integers(2, size=(6, 4, 5, channels), dtype=np.uint8) * 200
    with run_log(tmp_path) as log:
        log.clip("video", frames[:3], fps=4.0)
        log.row(a_row(1))
        log.clip("video", frames, fps=4.0)
        before = board(tmp_path).Images("video")
        shutil.rmtree(tmp_path / "tensorboard")
        log.row(a_row(2))
    assert [image.step for image in before] == [0, 8]
    (image,) = board(tmp_path).Images("video")
    assert (image.step, image.width, image.height) == (8, 5, 4)
    assert np.array_equal(frames_of(image.encoded_image_string), np.broadcast_to(frames, (6, 4, 5, 3)))


def test_a_run_shows_the_newest_frames_of_its_ring_as_a_video(tiny_config, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "newest_frames", lambda state: seen.append(newest_frames(state)) or seen[-1])
    config = tiny_config()
    loop.train(config, describe(config.env), torch.device("cpu"))
    (image,), (frames,) = board(config.run_dir).Images("video"), seen
    shown = frames_of(image.encoded_image_string)
    assert np.array_equal(shown, np.broadcast_to(frames, (*frames.shape[:3], 3)))
    assert len(shown) == 24, "the slots of a lane"
    balls = [np.argwhere(frame[:9, :, 0])[0, 0] for frame in shown if frame[:9].any()]
    assert set(np.diff(balls)) == {1, -8}, "the ball falls a row a step"


@pytest.mark.parametrize("jump", [-7200.0, 0.0, 7200.0])
def test_resumed_runs_hide_the_rows_of_lost_lives_however_the_time_of_day_jumps(tmp_path, monkeypatch, jump):
    now = [1.7e9]
    monkeypatch.setattr(log_module, "time", lambda: now[0])
    monkeypatch.setattr(event_file_writer.time, "time", lambda: now[0])  # it names the files
    for life, resume_at in enumerate([None, 2, 2, 2, 3]):
        with run_log(tmp_path, resume_at=resume_at) as log:
            for iteration in range((resume_at or 0) + 1, 6):
                log.row(a_row(iteration, x=float(life)))
                now[0] += jump
        assert len(event_files(tmp_path)) <= 2  # the newest, and an empty one
    assert curve(tmp_path, "x") == [(8, 0.0), (16, 0.0), (24, 3.0), (32, 4.0), (40, 4.0)]


def test_a_tensorboard_that_is_open_while_a_run_resumes_shows_no_row_twice(tmp_path, monkeypatch):
    with run_log(tmp_path) as log:
        for iteration in (1, 2, 3):
            log.row(a_row(iteration, x=1.0))
    opened = board(tmp_path)
    monkeypatch.setattr(event_file_writer.time, "time", lambda: 4e9)
    with run_log(tmp_path, resume_at=1) as log:
        log.row(a_row(2, x=2.0))
        assert [(event.step, event.value) for event in opened.Reload().Scalars("x")] == [(8, 1.0), (16, 2.0)]


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\0" * 50), lambda path: path.unlink()])
def test_an_event_file_that_is_damaged_or_deleted_is_replaced_by_the_next_life(tmp_path, spoil):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
    (path,) = event_files(tmp_path)
    spoil(path)
    with run_log(tmp_path, resume_at=5) as log:
        log.row(a_row(6))
        shutil.rmtree(tmp_path / "tensorboard")  # in the middle of one as well
        log.row(a_row(7))
    assert [step for step, _ in curve(tmp_path, "updates")] == [8, 48, 56]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_only_the_events_do_not_fit_it_is_said_once_and_all_rows_are_shown_when_they_fit_again(tmp_path, clock, capsys):
    with run_log(tmp_path) as log:
        log.row(a_row(1))
        (events,) = event_files(tmp_path)
        with file_size_limit(events.stat().st_size + 20):
            log.row(a_row(2))  # the thread of the writer dies of it
            log.row(a_row(3))
        clock.now += log_module.RETRY_S
        log.row(a_row(4))
        log.row(a_row(5))
    assert said(capsys, "tensorboard") == ["tensorboard: shows nothing new (File too large); metrics.jsonl has the rows"]
    assert [step for step, _ in curve(tmp_path, "updates")] == [8, 16, 24, 32, 40]
