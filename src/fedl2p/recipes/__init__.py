"""Recipes: functions that return a ready study, e.g. ``recipes.huggingface(dataset="...")``.

Each file holds one recipe, a function of the file's name under the decorator
:func:`~fedl2p.recipes.registry.recipe`; the first line of the file's docstring describes it. A
variant calls another recipe and changes fields with ``dataclasses.replace``. A function
``() -> Study`` outside this package is a recipe under the name ``package.module:callable``.
"""

from fedl2p.recipes.digits import digits as digits
from fedl2p.recipes.digits_sensors import digits_sensors as digits_sensors
from fedl2p.recipes.fashion import fashion as fashion
from fedl2p.recipes.fashionc import fashionc as fashionc
from fedl2p.recipes.federation import federation as federation
from fedl2p.recipes.huggingface import huggingface as huggingface
from fedl2p.recipes.kinds import kinds as kinds
from fedl2p.recipes.npz import npz as npz
from fedl2p.recipes.paper.cifar10 import cifar10 as cifar10
from fedl2p.recipes.paper.cifar10c import cifar10c as cifar10c
from fedl2p.recipes.paper.domainnet import domainnet as domainnet
from fedl2p.recipes.paper.office10 import office10 as office10
from fedl2p.recipes.paper.speech import speech as speech
from fedl2p.recipes.registry import describe as describe
from fedl2p.recipes.registry import find as find
from fedl2p.recipes.registry import get as get
from fedl2p.recipes.registry import names as names
from fedl2p.recipes.registry import recipe as recipe
from fedl2p.recipes.registry import variants as variants
from fedl2p.recipes.smoke import smoke as smoke
from fedl2p.recipes.spoken import spoken as spoken
from fedl2p.recipes.watch import watch as watch
