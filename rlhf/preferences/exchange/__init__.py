"""Labels in and out of the preference store: importing files, exporting data sets, and the card that describes them."""

from rlhf.preferences.exchange.export import ExportedLabels, ExportOptions, export_labels
from rlhf.preferences.exchange.formats import IMPORT_FORMATS
from rlhf.preferences.exchange.importing import ImportReport, check_file, import_file
from rlhf.preferences.exchange.items import ImportOptions
from rlhf.preferences.exchange.publishing import write_export
from rlhf.preferences.exchange.writers import EXPORT_FORMATS

__all__ = [
    "EXPORT_FORMATS",
    "IMPORT_FORMATS",
    "ExportOptions",
    "ExportedLabels",
    "ImportOptions",
    "ImportReport",
    "check_file",
    "export_labels",
    "import_file",
    "write_export",
]
