"""What an experiment returns, and how it is kept."""

from analyses.result.finding import Finding as Finding
from analyses.result.result import Result as Result
