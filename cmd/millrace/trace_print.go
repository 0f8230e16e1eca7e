package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

// traceReport is what a trace found, and its JSON form (docs/trace.md).
type traceReport struct {
	Version       int     `json:"version"`
	WindowSeconds float64 `json:"window_seconds"`
	Node          string  `json:"node"`
	// Nodes are those that --nodes asked and that answered.
	Nodes      []string        `json:"nodes,omitempty"`
	Kernel     string          `json:"kernel"`
	Namespaces []string        `json:"namespaces"`
	Verdicts   []cause.Verdict `json:"verdicts"`
	// Others is how many verdicts are about packets that were not asked for.
	Others int `json:"others"`
	// Times are how long packets took that were asked for and went on, the longest first.
	Times []stepTime `json:"times"`
	// Folded are packets that died as they have to where all is well.
	Folded  []folded `json:"folded"`
	Missing []string `json:"missing"`
	Lost    uint64   `json:"lost"`
}

// stepTime is how long packets took from one place to the next, where they were seen at
// both.
type stepTime struct {
	From    timeSpot      `json:"from"`
	To      timeSpot      `json:"to"`
	Packets uint64        `json:"packets"`
	Mean    time.Duration `json:"mean_ns"`
	Longest time.Duration `json:"longest_ns"`
}

// timeSpot is a device where packets come, are given to its queue, or leave.
type timeSpot struct {
	Namespace string      `json:"namespace"`
	Interface string      `json:"interface"`
	Point     cause.Point `json:"point"`
}

func (s timeSpot) String() string {
	words := map[cause.Point]string{cause.Came: "came by %s", cause.Queued: "queue of %s", cause.Left: "left by %s"}
	return s.Namespace + ": " + fmt.Sprintf(words[s.Point], s.Interface)
}

// folded are drops of one reason in one namespace.
type folded struct {
	Reason    string `json:"reason"`
	Namespace string `json:"namespace"`
	Count     uint64 `json:"count"`
}

func newTraceReport(e *cause.Evidence, verdicts []cause.Verdict, died []cause.Event, spaces []trace.Namespace) *traceReport {
	r := &traceReport{
		Version: 1, WindowSeconds: e.Window.Seconds(), Node: hostname(), Kernel: e.Kernel, Namespaces: []string{},
		Verdicts: append([]cause.Verdict{}, verdicts...), Folded: []folded{},
		Missing: append([]string{}, e.Missing...), Lost: e.Lost,
	}
	names := map[uint32]string{}
	for _, s := range e.Spaces {
		names[s.Inode] = s.Name
	}
	r.Times = timesOf(e)
	for _, s := range spaces {
		r.Namespaces = append(r.Namespaces, s.Name)
	}
	for i := range r.Verdicts {
		r.Verdicts[i].Where.Node = r.Node
	}
	for _, e := range died {
		f := folded{Reason: e.Reason, Namespace: names[e.Space]}
		if f.Reason == "" {
			f.Reason = e.Location
		}
		at := slices.IndexFunc(r.Folded, func(o folded) bool { return o.Reason == f.Reason && o.Namespace == f.Namespace })
		if at < 0 {
			at = len(r.Folded)
			r.Folded = append(r.Folded, f)
		}
		r.Folded[at].Count += e.Count
	}
	return r
}

// timesOf are the times of the evidence, at devices that are still there.
func timesOf(e *cause.Evidence) []stepTime {
	all := []stepTime{}
	spot := func(of cause.Spot) (at timeSpot, known bool) {
		for _, s := range e.Spaces {
			for _, l := range s.After.Links {
				if s.Inode == of.Space && l.Index == of.Index {
					return timeSpot{s.Name, l.Name, of.Point}, true
				}
			}
		}
		return at, false
	}
	for _, p := range e.Passages {
		from, known := spot(p.From)
		to, too := spot(p.To)
		if known && too {
			all = append(all, stepTime{from, to, p.Packets, p.Mean, p.Longest})
		}
	}
	return all
}

// timesShown is how many are printed.
const timesShown = 10

// print is the report for people.
func (r *traceReport) print(w io.Writer) error {
	out := &lines{w: w}
	out.say("millrace trace  node %s  kernel %s  namespaces %d  window %.1f s", r.Node, visible(r.Kernel), len(r.Namespaces), r.WindowSeconds)
	for _, v := range r.Verdicts {
		out.say("")
		where := v.Where.Namespace
		if v.Where.Pod != "" {
			where = fmt.Sprintf("pod %s (%s)", v.Where.Pod, v.Where.Namespace)
		}
		if len(r.Nodes) > 0 {
			where = "node " + v.Where.Node + ": " + where
		}
		for _, more := range []string{v.Where.Hook, v.Where.Interface} {
			if more != "" {
				where += ", " + more
			}
		}
		out.say("%s  %s", red("DIED"), bold(visible(v.Title)))
		out.field("cause", fmt.Sprintf("%s  (confidence %s)", v.Cause, v.Confidence))
		out.field("where", where)
		if v.Tuple != nil {
			out.field("packet", fmt.Sprintf("%s %s > %s", v.Tuple.Protocol,
				named(v.Tuple.Source, v.Tuple.SourceName), named(v.Tuple.Destination, v.Tuple.DestinationName)))
		}
		for _, step := range v.Way {
			out.field("way", stepText(step))
		}
		for _, e := range v.Evidence {
			out.field("evidence", e)
		}
		for _, n := range v.Not {
			out.field("not", n)
		}
		out.field("fix", v.Fix)
		out.field("undo", v.Undo)
		out.field("owner", v.Owner)
	}
	switch {
	case len(r.Verdicts) > 0:
	case r.Others > 0:
		out.say("%s  nothing died of what is asked for", green("ok"))
	default:
		out.say("%s  no packet died that should not have, and no connection failed", green("ok"))
	}
	if r.Others > 0 {
		out.say("")
		out.say("verdicts about other packets: %d; leave FROM, TO and the filter out to see them", r.Others)
	}
	out.say("")
	for i, t := range r.Times {
		if i == timesShown {
			out.say("times of %d other steps: -o json", len(r.Times)-timesShown)
			break
		}
		out.say("time  %s -> %s  mean %s, longest %s of %d packets", visible(t.From.String()), visible(t.To.String()), timeText(t.Mean), timeText(t.Longest), t.Packets)
	}
	if len(r.Folded) > 0 {
		out.say("folded: %s, as they die where all is well", visible(r.foldedText()))
	}
	for _, m := range r.Missing {
		out.say("not seen: %s", visible(m))
	}
	if r.Lost > 0 {
		out.say("not seen apart: %d events, for which there was no room; they are in the totals", r.Lost)
	}
	return out.err
}

// timeText is a time with three digits or so.
func timeText(d time.Duration) string {
	if d < time.Millisecond {
		return d.Round(100 * time.Nanosecond).String()
	}
	return d.Round(10 * time.Microsecond).String()
}

// stepText is "h2r: in by ra, 10.71.2.0/24 dev rb".
func stepText(s cause.Step) string {
	text := s.Namespace
	if s.Pod != "" {
		text = "pod " + s.Pod
	}
	if s.In != "" {
		text += ": in by " + s.In + ", "
	} else {
		text += ": "
	}
	if s.Translation != "" {
		text += s.Translation + ", "
	}
	if s.Route == "" {
		return text + "no route"
	}
	return text + s.Route
}

// foldedText counts what was folded, by reason.
func (r *traceReport) foldedText() string {
	var all uint64
	counts := map[string]uint64{}
	for _, f := range r.Folded {
		all += f.Count
		counts[f.Reason] += f.Count
	}
	var parts []string
	for _, reason := range slices.Sorted(maps.Keys(counts)) {
		parts = append(parts, fmt.Sprintf("%d %s", counts[reason], reason))
	}
	return fmt.Sprintf("%d packets (%s)", all, strings.Join(parts, ", "))
}

// lines writes lines and keeps the first error.
type lines struct {
	w    io.Writer
	err  error
	last string
}

func (l *lines) say(format string, values ...any) {
	if _, err := fmt.Fprintf(l.w, format+"\n", values...); err != nil && l.err == nil {
		l.err = err
	}
	l.last = ""
}

// visible is a text without what a terminal would take for an order: pods choose names of
// processes and devices, and comments of rules.
func visible(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, text)
}

// field is one line of a verdict; a name that was just there is not repeated.
func (l *lines) field(name, value string) {
	if value == "" {
		return
	}
	shown := name
	if l.last == name {
		shown = ""
	}
	for i, line := range strings.Split(value, "\n") {
		if i > 0 {
			shown = ""
		}
		l.say("  %-9s %s", shown, visible(line))
	}
	l.last = name
}
