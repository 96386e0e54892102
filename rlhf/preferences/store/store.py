"""The preference store as one class; each of its bases adds the methods of one concern."""

from __future__ import annotations

from rlhf.preferences.store.figures import Figures


class PreferenceStore(Figures):
    """A project's prompts, responses, tasks and labels in one SQLite file.

    `database` says how it is opened and written, `content` what is asked, `assignments` who is asked, `labels` what was
    answered, `recording` labels from elsewhere, `figures` how far it is. Use `create`, `open` or `open_or_create`, and
    `with` or `close`.
    """
