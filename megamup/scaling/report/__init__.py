"""`report.html`: one self-contained page on fitted laws, for whoever decides whether to train the large model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megamup.errors import MegamupError
from megamup.page import figure_section, page, table_section
from megamup.scaling.allocation import Cluster
from megamup.scaling.allocation import as_json as allocation_json
from megamup.scaling.allocation import table_rows as allocation_rows
from megamup.scaling.analysis import Result, inputs_of
from megamup.scaling.critical_batch import CriticalBatches
from megamup.scaling.curves import Curve
from megamup.scaling.envelope import Envelope
from megamup.scaling.estimate import Estimate, estimate
from megamup.scaling.figures.backtest import backtest_drawing
from megamup.scaling.figures.batch import critical_batch_drawing
from megamup.scaling.figures.curves import curves_drawing, envelope_drawing
from megamup.scaling.figures.drawing import Drawing, plain
from megamup.scaling.figures.frontier import contour_drawing, has_frontier, optimum_drawing
from megamup.scaling.figures.isoflop import isoflop_drawing
from megamup.scaling.figures.loss import loss_drawings
from megamup.scaling.figures.residuals import influence_drawing, residual_drawing
from megamup.scaling.fit_file import to_json
from megamup.scaling.influence import flags, influence
from megamup.scaling.isoflop import IsoFlop
from megamup.scaling.mfu import Utilisation, utilisations
from megamup.scaling.mfu import as_json as utilisation_json
from megamup.scaling.mfu import table_rows as utilisation_rows
from megamup.scaling.mfu_figure import mfu_figure
from megamup.scaling.report import tables
from megamup.scaling.report.allotment import allotments
from megamup.scaling.report.verdict import Verdict, cards, judge
from megamup.scaling.runs import Ladder, Point, read_curve
