"""The search itself: what can be tried, what is tried next, how it is built, judged and timed, and what is kept."""
