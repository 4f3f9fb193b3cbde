"""Sites that a researcher makes of images of his own. Apart from the simulation: it needs neither torch nor Flower."""

from client.data.checks import describe
from client.data.cutting import make_sites
from client.data.phantoms import PROFILES, make_phantom_sites

__all__ = ["PROFILES", "describe", "make_phantom_sites", "make_sites"]
