"""A built module that is given other methods is, holds, copies and pickles what it did before."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from rev_det.modeling.derived import Methods, derived, give_methods, split


class Scale:
    """Not a module, as Detectron2's box transforms are none."""

    def apply(self, x):
        return 5 * x


class Head(nn.Linear):
    """Calls what its subclasses may change."""

    def __init__(self, scale):
        super().__init__(2, 2)
        self.scale = scale

    def forward(self, x):
        return self.scale.apply(self.layers(x))

    def layers(self, x):
        return super().forward(x)


class OtherLayers(Head):
    def layers(self, x):
        return -super().layers(x)


class OtherForward(Head):
    def forward(self, x):
        return x


class OtherCopy(Head):
    def __reduce__(self):
        return Head, (self.scale,)


class Doubled(Methods):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(Methods):
    def forward(self, x):
        return -super().forward(x)


class Tripled(Methods):
    def apply(self, x):
        return 3 * super().apply(x)


TABLE = {Head: Doubled, Scale: Tripled}
X = torch.tensor([[1.0, -2.0]])


def make(*heads):
    torch.manual_seed(0)
    scale = Scale()
    return nn.Sequential(*(head(scale) for head in heads or (Head, OtherLayers)))


def classes(model):
    return [type(thing) for thing in (*model, *(head.scale for head in model))]


def changed():
    model = make()
    assert give_methods(model, TABLE) == {}
    return model


def test_methods_are_replaced_in_modules_subclasses_and_what_they_hold_and_nothing_else_is():
    plain, model = make(), make()
    state, ids, seen = model.state_dict(), [id(p) for p in model.parameters()], []
    model[0].register_forward_hook(lambda module, inputs, result: seen.append(result))
    for _ in range(2):  # a second time changes nothing
        assert give_methods(model, TABLE) == {}
        torch.testing.assert_close(model(X), 6 * plain[1](6 * plain[0](X)))
        assert [cls.__name__ for cls in classes(model)[:2]] == ["HeadWithDoubled", "OtherLayersWithDoubled"]
    assert isinstance(model[0], Head) and isinstance(model[1], OtherLayers)
    assert model[0].scale is model[1].scale  # given once, though both hold it
    assert len(seen) == 2
    assert [id(p) for p in model.parameters()] == ids and list(model.state_dict()) == list(state)
    # Other models of these classes, in the same program:
    assert classes(changed()) == classes(model)
    assert classes(make()) == [Head, OtherLayers, Scale, Scale]


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        copy.copy,
        lambda model: AveragedModel(model).module,
        saved,
        *(lambda m, p=protocol: pickle.loads(pickle.dumps(m, p)) for protocol in range(6)),
    ],
    ids=["deepcopy", "copy", "EMA", "torch.save", *(f"pickle {protocol}" for protocol in range(6))],
)
def test_copies_are_what_the_model_is(duplicate):
    model = changed()
    give_methods(model, {Head: Negated})  # a second set, over the first
    assert type(model[0]).__name__ == "HeadWithDoubledWithNegated"
    assert split(type(model[0])) == (Head, [Doubled, Negated])
    again = duplicate(model)
    assert again is not model
    assert classes(again) == classes(model)
    assert again[0].scale is again[1].scale
    torch.testing.assert_close(again(X), model(X), rtol=0, atol=0)


def own_forward(scale):
    head = Head(scale)
    head.forward = lambda x: x
    return head


@pytest.mark.parametrize(
    "head, reason",
    [
        (OtherForward, "OtherForward has its own forward(), not that of Head"),
        (OtherCopy, "OtherCopy has its own way of being copied"),
        (own_forward, "Head has its own forward(), not that of Head"),  # the object alone
    ],
)
def test_what_does_it_in_its_own_way_stays_and_is_named(head, reason):
    model = make(Head, head)
    stays = type(model[1])
    for _ in range(2):
        assert give_methods(model, TABLE) == {"1": reason}
    assert type(model[0]) is derived(Head, Doubled) and type(model[1]) is stays


def test_the_closest_base_class_decides():
    model = make()
    give_methods(model, {Head: Doubled, OtherLayers: Negated})
    assert [split(type(head)) for head in model] == [(Head, [Doubled]), (OtherLayers, [Negated])]


def test_a_later_subclass_of_the_derived_class_is_known():
    model = changed()
    model[0].__class__ = type("Wrapped", (type(model[0]),), {})  # as torch's fully_shard does
    assert give_methods(model, TABLE) == {}
    assert type(model[0]).__name__ == "Wrapped"
