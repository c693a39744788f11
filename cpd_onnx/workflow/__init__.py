"""End-to-end workflows: from a request to the written files, with the records that allow a run to be repeated."""
