"""What the actions of an environment are called."""

from __future__ import annotations

from speedyzero.envs import EnvSpec

JOYSTICK = (
    "NOOP", "FIRE", "UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT", "UPFIRE", "RIGHTFIRE", "LEFTFIRE",
    "DOWNFIRE", "UPRIGHTFIRE", "UPLEFTFIRE", "DOWNRIGHTFIRE", "DOWNLEFTFIRE",
)  # fmt: skip
"""All actions of the Arcade Learning Environment, by number."""

MINIMAL = {
    "airraid carnival demonattack galaxian namethisgame pong sirlancelot spaceinvaders": (0, 1, 3, 4, 11, 12),
    "amidar mrdo timepilot wizardofwor": (0, 1, 2, 3, 4, 5, 10, 11, 12, 13),
    "assault": (0, 1, 2, 3, 4, 11, 12),
    "asterix crazyclimber koolaid lostluggage mspacman": (0, 2, 3, 4, 5, 6, 7, 8, 9),
    "asteroids": (0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12, 13, 14, 15),
    "atlantis atlantis2": (0, 1, 11, 12),
    "backgammon": (1, 3, 4),
    "basicmath kingkong qbert": (0, 1, 2, 3, 4, 5),
    "beamrider": (0, 1, 2, 3, 4, 6, 7, 11, 12),
    "blackjack casino": (0, 1, 2, 5),
    "bowling pooyan upndown": (0, 1, 2, 5, 10, 13),
    "breakout kaboom": (0, 1, 3, 4),
    "enduro": (0, 1, 3, 4, 5, 8, 9, 11, 12),
    "freeway": (0, 2, 5),
    "frogger pacman surround": (0, 2, 3, 4, 5),
    "gopher": (0, 1, 2, 3, 4, 10, 11, 12),
    "journeyescape": (0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17),
    "keystonekapers": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13),
    "kungfumaster": (0, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14, 15, 16, 17),
    "othello tictactoe3d videochess": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    "phoenix": (0, 1, 3, 4, 5, 11, 12, 13),
    "skiing": (0, 3, 4),
    "tetris": (0, 1, 3, 4, 5),
    "turmoil": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12),
    "tutankham": (0, 2, 3, 4, 5, 10, 11, 12),
    "videocheckers": (1, 6, 7, 8, 9),
    "videopinball": (0, 1, 2, 3, 4, 5, 10, 11, 12),
}
"""The minimal action sets that are not all 18, as ALE 0.12.1's `getMinimalActionSet` says, by EnvPool's games in lower case."""

OTHERS = {"catch": ("LEFT", "STAY", "RIGHT"), "cartpole": ("LEFT", "RIGHT")}


def action_names(spec: EnvSpec) -> list[str]:
    """A name for each action: ALE's for Atari, numbers for an environment that is not known here."""
    game = spec.env_id.rpartition("-v")[0].lower()
    names: tuple[str, ...] = OTHERS.get(game, ())
    if spec.family == "atari":
        numbers = next((numbers for games, numbers in MINIMAL.items() if game in games.split()), range(len(JOYSTICK)))
        names = tuple(JOYSTICK[number] for number in numbers)
    return list(names) if len(names) == spec.num_actions else [str(action) for action in range(spec.num_actions)]
