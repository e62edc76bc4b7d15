"""`evaluating`: one way into evaluation mode and back."""

import pytest
from torch import nn

from upcycling.core.model import evaluating


@pytest.mark.parametrize("error", [None, RuntimeError("inside")])
def test_each_module_gets_its_own_mode_back_also_after_an_error(error):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    model[1][0].eval()  # frozen by its owner
    before = [module.training for module in model.modules()]
    try:
        with evaluating(model) as inside:
            assert inside is model and not any(module.training for module in model.modules())
            if error:
                raise error
    except RuntimeError as raised:
        assert raised is error
    assert [module.training for module in model.modules()] == before == [True, True, True, False, True]
