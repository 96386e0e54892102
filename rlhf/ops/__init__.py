"""Pure tensor maths. Imports torch and jaxtyping only; nothing here knows of models, configs or ranks.

Axes: `B` batch, `R` response, `T` prompt and response, `V` vocabulary. Masks are bool, True is a real token that
counts. No function broadcasts: shapes that differ raise `ValueError`, a mask that is not bool raises `TypeError`.
Whatever stands in a masked slot, NaN included, changes neither an output on a real token nor a gradient.
"""
