"""Numbers that the rules of a comparison fix for searches, and the seeds that are set aside for them."""

TRIALS, FINALISTS, MORE_SEEDS = 20, 3, 2  # of ruleset "defaults"
STUDIES, TRIALS_OF_STUDY = 3, 5  # of ruleset "tuned"
FIRST_SEED = 1000  # of a search's runs; results use seeds from 0, so that none was selected on
STUDY_SEEDS = 100  # set aside for each study
