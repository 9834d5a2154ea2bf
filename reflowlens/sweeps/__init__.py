"""The engine that performs many interventions: only what differs from the unpatched run is run."""
