"""What an agent sees and thinks, as pictures: the game, the panel beside it, the tree of a search, and the video of them."""
