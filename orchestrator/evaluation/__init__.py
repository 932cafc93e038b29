"""One evaluation of one state on one worker."""
