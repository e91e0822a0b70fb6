"""Catalogues of a later release: what is installed, with a read model that is new or changed."""

from dataclasses import replace
from typing import Any, TypeVar

from pipeline import catalogue
from pipeline.catalogue import Catalogue
from pipeline.readmodel import Field, Projector

_Model = TypeVar("_Model", bound=Any)


def with_models(*models: Projector, **views: str) -> Catalogue:
    """What is installed, with these read models and views, in place of those of the same names."""
    installed = catalogue.load()
    names = {model.name for model in models}
    others = [model for model in installed.models if model.name not in names]
    models = tuple(sorted([*others, *models], key=lambda model: model.name))
    return replace(installed, models=models, views={**installed.views, **views})


def with_field(model: _Model, column: str, **changes: Any) -> _Model:
    """A read model with one field changed."""
    fields = [
        replace(field, **changes) if field.column == column else field for field in model.fields
    ]
    return replace(model, fields=fields)


def without_field(model: _Model, column: str) -> _Model:
    """A read model without one of its fields."""
    return replace(model, fields=[field for field in model.fields if field.column != column])


def with_more(model: _Model, *fields: Field) -> _Model:
    """A read model with further fields."""
    return replace(model, fields=[*model.fields, *fields])
