"""What a template calls is bound along with it."""

import numpy as np

from numbaloss.kernels.bind import Helpers, bind
from numbaloss.kernels.math import exp

SCALE = 1
CHOSEN = None
# In place of the module that it is in, so that these are functions of its folder.
__name__ = "numbaloss.kernels.cuda.templates"


def leaf(x):
    return SCALE * x


def middle(x):
    return leaf(x) + leaf(x)


def template(x):
    return middle(x), CHOSEN(x), exp(x), [leaf(k) for k in (1, 2)]


def other(x):
    return -leaf(x)


class Compiled:
    """In place of a device function."""

    made = 0

    def __init__(self, function):
        Compiled.made += 1
        self.py_func = function

    def __call__(self, x):
        return self.py_func(x)


def bound(scope, identity="id", helpers=None, of=template):
    return bind(of, scope, "test", identity, lambda f: f, helpers or Helpers(Compiled))


def test_what_a_template_names_is_bound_to_the_same_scope_once():
    Compiled.made = 0
    helpers = Helpers(Compiled)
    kernel = bound(dict(SCALE=3, CHOSEN=other), helpers=helpers)
    assert kernel(2.0) == (12.0, -6.0, np.exp(2.0), [3, 6])
    assert Compiled.made == len(helpers.bound) == 3  # and not `exp`, of another folder
    assert isinstance(kernel.__globals__["middle"].py_func.__globals__["leaf"], Compiled)
    again = bound(dict(SCALE=3, CHOSEN=other), helpers=helpers, of=middle)
    assert again(1) == 6 and Compiled.made == 3
    assert leaf(5) == 5  # the module's own is as it was


def test_compiled_functions_stay_as_they_are():
    done = Compiled(lambda x: 100 * x)
    assert bound(dict(CHOSEN=done))(2.0)[1] == 200
    assert bound(dict(CHOSEN=done)).__globals__["CHOSEN"] is done


def test_the_name_says_constants_and_functions_of_the_scope():
    def name(identity="id", **scope):
        return bound(dict(CHOSEN=other, **scope), identity).__qualname__

    names = [
        name(SCALE=3),
        name(SCALE=2),
        name(SCALE=3.0),
        name(SCALE=np.float32(3)),
        name(SCALE=None),
        name(SCALE=np.float32),
        name(SCALE=(3, True)),
        name(SCALE=(3, 1)),
        name("another", SCALE=3),
        bound(dict(SCALE=3, CHOSEN=leaf)).__qualname__,
    ]
    assert len(set(names)) == len(names)
    assert name(SCALE=3) == names[0]
