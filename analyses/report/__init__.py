"""What people read: one HTML file, in their language."""

from analyses.report.page import write_report as write_report
