"""The statistics every experiment shares: p-values, intervals, Holm's correction, verdicts, and random draws by name.

Everything is a pure function of its arguments, the seed among them. "Unit" is the unit of replication: a word pair, a
prompt, a token; never one of several measurements of the same unit.
"""

from analyses.statistics.draws import derive_generator as derive_generator
from analyses.statistics.draws import derive_rng as derive_rng
from analyses.statistics.draws import derive_seed as derive_seed
from analyses.statistics.intervals import Interval as Interval
from analyses.statistics.intervals import bootstrap_band as bootstrap_band
from analyses.statistics.intervals import bootstrap_interval as bootstrap_interval
from analyses.statistics.intervals import rate_band as rate_band
from analyses.statistics.intervals import rate_interval as rate_interval
from analyses.statistics.pvalues import benjamini_hochberg as benjamini_hochberg
from analyses.statistics.pvalues import holm as holm
from analyses.statistics.pvalues import paired_permutation_pvalue as paired_permutation_pvalue
from analyses.statistics.pvalues import permutation_pvalue as permutation_pvalue
from analyses.statistics.pvalues import predictive_pvalue as predictive_pvalue
from analyses.statistics.pvalues import sign_flip_pvalues as sign_flip_pvalues
from analyses.statistics.resampling import mean_band as mean_band
from analyses.statistics.verdicts import verdict as verdict
