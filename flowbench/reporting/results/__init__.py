"""Published results: what a contribution must keep to, where records lie, the pages made from them; docs/submit.md."""
