"""Watching an agent: the picture is of the game that is played, and the game is the one that an evaluation plays."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

import speedyzero
from speedyzero import evaluate, watch
from speedyzero.emulators import Emulators
from speedyzero.envs import EnvError, describe
from speedyzero.pictures import scene
from speedyzero.pictures.actions import MINIMAL, action_names
from speedyzero.pictures.panel import WIDTH
from speedyzero.pictures.tree import layout
from tests.agents import spec_of, write_run


@pytest.fixture
def run(tiny_config, tmp_path):
    def make(**settings):
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        config = tiny_config(**{"simulations": 5} | settings)
        write_run(config)
        return config

    return make


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["watch", *map(str, arguments)])
    watch.main()
    return capsys.readouterr().out


class Spy:
    """A pool of EnvPool's that remembers what it said of its emulators' memory."""

    def __init__(self, pool):
        self._pool, self.ram = pool, None

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def recv(self):
        *said, info = self._pool.recv()
        self.ram = info["ram"].copy()
        return *said, info


def test_the_picture_is_of_the_emulator_that_is_played_to_the_last_byte_of_its_memory(monkeypatch):
    make, pools = Emulators._make, []
    monkeypatch.setattr(Emulators, "_make", lambda self: pools.append(Spy(make(self))) or pools[-1])
    emulators = Emulators(describe("Breakout-v5", frame_size=64, gray=True), 1, 5, training=False, sticky_actions=0.25)
    picture = scene.Scene(emulators)
    random, seen = torch.Generator().manual_seed(0), set()
    emulators.reset()
    picture.reset()
    for _ in range(150):
        emulators.actions.copy_(torch.randint(4, (1,), generator=random))
        for one in (emulators, picture):
            one.send()
        for one in (emulators, picture):
            one.recv()
        assert np.array_equal(pools[0].ram, pools[1].ram)
        image = picture.picture()
        seen.add(image.tobytes())
    assert image.shape == (210, 160, 3)
    small = np.asarray(Image.fromarray(image).convert("L").resize((64, 64), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(small.ravel(), emulators.frames.numpy().ravel())[0, 1] > 0.95
    assert len(seen) > 100
    picture._screen.recv = lambda: None  # a step behind
    emulators.send()
    emulators.recv()
    picture._screen.reward += 1
    with pytest.raises(EnvError, match="the picture's game is no longer the one that is played"):
        picture.recv()
    emulators.close()
    picture.close()


def test_the_game_is_the_one_that_an_evaluation_of_one_game_plays(run):
    config = run(frame_stack=4)
    agent = speedyzero.load(config.run_dir)
    games = []
    for moment in watch.play(agent, 11):
        if moment.search is None:
            games.append((moment.score, moment.step))
            if len(games) == 4:
                break
    wanted = evaluate.play(agent.snapshot, config, spec_of(config), 1, 11)[0]
    assert games[0] == (wanted.score, wanted.length)
    assert {length for _, length in games} == {9}
    assert len({score for score, _ in games}) == 2, "scores begin again with each game"


def test_a_gif_shows_the_board_beside_the_panel_at_each_step(run, monkeypatch, capsys, tmp_path):
    out = tmp_path / "catch.gif"
    said = call(monkeypatch, capsys, run().run_dir, "--out", out, "--games", "2", "--fps", "10")
    assert "2 games" in said
    assert "18 steps, 510 x 420 at 10 frames a second" in said
    with Image.open(out) as gif:
        assert gif.size == (210 + WIDTH, 420)
        frames, shown = [], 0
        for index in range(gif.n_frames):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB"))[:, :210])
            shown += gif.info["duration"]
    assert shown == 100 * (2 * 10 + 2 * 5), "each moment for a tenth of a second, and half a second more at the end of a game"
    balls = [np.argwhere(frame[21::42, 21::42, 0] > 128)[0, 0] for frame in frames]
    assert balls[:9] == list(range(9)), "the ball falls a row a step"


def test_an_mp4_has_a_frame_a_step(run, monkeypatch, capsys, tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    out = tmp_path / "catch.mp4"
    call(monkeypatch, capsys, run().run_dir, "--out", out, "--steps", "12", "--fps", "5")
    frames, seconds = ffmpeg.count_frames_and_secs(str(out))
    assert (frames, seconds) == (12 + 1 + 1 + 2, pytest.approx(16 / 5, abs=0.05))  # the reset, the end of the first game held for two


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--out", "a.avi"], r"--out a.avi: give a file that ends in .mp4 or .gif"),
        (["--out", "a.mp4"], "an MP4 needs imageio-ffmpeg: pip install 'speedyzero\\[watch\\]', or give --out FILE.gif"),
        (["--tree", "9"], "--tree 9: the game is over there, after 9 steps"),
        (["--games", "0"], "--games 0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_nothing_is_written(run, monkeypatch, capsys, tmp_path, arguments, line):
    config = run()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: {line}[^\n]*$"):
        call(monkeypatch, capsys, config.run_dir, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_environment_without_a_picture_is_refused(run, monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^error: FrozenLake-v1: there is no picture to watch"):
        call(monkeypatch, capsys, run(env="FrozenLake-v1").run_dir, "--out", "a.gif")


def test_a_tree_is_drawn_as_svg_and_png(run, monkeypatch, capsys, tmp_path):
    config = run(env="CartPole-v1", simulations=12)
    said = call(monkeypatch, capsys, config.run_dir, "--tree", "3", "--out", tmp_path / "tree.svg")
    assert f"{tmp_path / 'tree.svg'} and {tmp_path / 'tree.png'}: 13 nodes" in said
    assert ElementTree.parse(tmp_path / "tree.svg").getroot().tag.endswith("svg")
    with Image.open(tmp_path / "tree.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 50
    tree = speedyzero.load(config.run_dir).search(np.zeros(4, np.float32)).tree
    rows = layout(tree)
    leaves = [node for node in range(13) if not tree.children(node)]
    assert sorted(rows[leaves]) == list(range(len(leaves))), "no two leaves on one row"
    for node in set(range(13)) - set(leaves):
        assert rows[tree.children(node)[0]] <= rows[node] <= rows[tree.children(node)[-1]]


def test_a_tree_of_a_later_game_says_how_long_the_first_was_and_a_terminal_shows_how_far_it_is(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    config = run()
    monkeypatch.setattr("sys.argv", ["watch", str(config.run_dir), "--tree", "23", "--out", str(tmp_path / "tree.svg")])
    watch.main()
    said = capsys.readouterr()
    assert "in game 3, as the first was over after 9 steps" in said.out
    assert "step 12 of 23, game 2, score " in said.err


def test_the_pole_leans_to_the_side_that_it_falls_to():
    upright, right = scene.cart(0.0, 0.0), scene.cart(0.0, 0.5)
    brown = [np.argwhere((image[..., 0] > 180) & (image[..., 2] < 100)).mean(0) for image in (upright, right)]
    assert brown[1][1] > brown[0][1] + 20


def test_every_game_of_envpool_has_as_many_names_as_actions():
    import envpool

    ids = {task.rpartition("-v")[0].lower(): task for task in envpool.list_all_envs() if task.endswith("-v5")}
    listed = {game: numbers for games, numbers in MINIMAL.items() for game in games.split()}
    assert listed.keys() <= ids.keys()
    for game in (*listed, "alien", "krull"):
        spec = describe(ids[game])
        names = action_names(spec)
        assert len(set(names)) == spec.num_actions, game
        assert not any(name.isdecimal() for name in names), game
