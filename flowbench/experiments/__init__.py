"""From a configuration to records: runs, studies, ablations, evaluations."""
