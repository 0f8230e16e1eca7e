package cause

import "slices"

// DiagnoseFor is Diagnose for somebody who asks about some of the packets only. All of
// the evidence is judged, for what others met may be the cause of what these met; about
// are the causes that one of the events asked for is of or follows from, and those
// that concern everybody, having no tuple. Their counts, tuples and titles are of what was
// asked for alone. The others are the rest; folded are packets that died
// and that no cause is named for: they die where all is well, too.
func DiagnoseFor(e *Evidence, asked func(*Event) bool) (about, others []Verdict, folded []Event) {
	d := judgeFor(e, asked)
	d.sort()
	follows := map[string]bool{}
	for _, event := range d.events {
		if event.asked {
			follows[event.by] = true
		}
	}
	for _, v := range d.verdicts {
		if v.asked && v.others > 0 {
			v.saw("%s that were not asked for died of it, too", times(v.others, "packet", "packets"))
		}
	}
	for _, v := range d.verdicts {
		named := slices.ContainsFunc(d.verdicts, func(o *Verdict) bool { return o.Cause == v.Cause && o.asked })
		if v.asked || d.concerns(v, asked) || follows[v.Cause] && !named {
			about = append(about, *v)
		} else {
			others = append(others, *v)
		}
	}
	return about, others, d.folded()
}

// concerns says that a verdict without an event that is asked for is about them all the
// same: by its tuple, or since it has none.
func (d *diagnosis) concerns(v *Verdict, asked func(*Event) bool) bool {
	if v.Tuple == nil {
		return true
	}
	e := &Event{Tuple: Tuple{Source: v.Tuple.Source, Destination: v.Tuple.Destination}}
	for _, s := range d.Spaces {
		if s.Name == v.Where.Namespace {
			e.Space = s.Inode
		}
	}
	return asked(e)
}

// askFor marks the events that are asked for, and brings them to the front: a
// verdict is told by the first of its events.
func (d *diagnosis) askFor(asked func(*Event) bool) {
	for _, e := range d.events {
		e.asked = asked(e.Event)
	}
	slices.SortStableFunc(d.events, func(a, b *seen) int {
		switch {
		case a.asked == b.asked:
			return 0
		case a.asked:
			return -1
		}
		return 1
	})
	d.asks = true
}

// beside is where a rule writes what it says of an event that nobody asked for, if
// its verdict is told by one that somebody did; nil for all else.
func (d *diagnosis) beside(v *Verdict, e *seen) *Verdict {
	if !d.asks || e == nil {
		return nil
	}
	if e.asked {
		if !v.asked { // what it was told by until now was of others
			v.asked, v.others, v.Packets, v.Tuple = true, v.Packets, 0, nil
		}
		return nil
	}
	if !v.asked {
		return nil
	}
	if e.Kind == Drop {
		v.others += e.Count
	}
	scratch := *v
	scratch.alike, scratch.Evidence, scratch.Not = map[string]int{}, nil, nil
	return &scratch
}
