"""The HTML pages: a run's report, and what ``fastlstm.inspect`` shows of its cells."""
