package knob

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Status says what becomes of a setting.
type Status string

// The statuses.
const (
	// Change: it will be set.
	Change Status = "change"
	// Enough: it is as it should be, or setting it would do nothing.
	Enough Status = "enough"
	// Owned: somebody else sets it; Proposal.Reason says whom to ask.
	Owned Status = "owned"
	// Unknown: it cannot be read, or what its value is computed from cannot.
	Unknown Status = "unknown"
)

// Proposal is what should become of one setting of one namespace.
type Proposal struct {
	ID      string `json:"id"`
	Setting string `json:"setting"`
	Scope   Scope  `json:"scope"`
	// Space is the namespace: "node", "pod web-7f".
	Space string `json:"space"`
	// Current is what it is, Wanted what it should be; with AtLeast more will do.
	Current string `json:"current"`
	Wanted  string `json:"wanted,omitempty"`
	AtLeast bool   `json:"at_least,omitempty"`
	Status  Status `json:"status"`
	// Owner is who sets it, where somebody does.
	Owner string `json:"owner,omitempty"`
	// Field is the field of kube-proxy's configuration that it follows, where that is
	// among the proposals.
	Field string `json:"field,omitempty"`
	// Finding is the check of doctor that fired here, Evidence what it saw.
	Finding  string   `json:"finding,omitempty"`
	Evidence []string `json:"evidence,omitempty"`
	// Reason says why nothing is done, and what to do instead.
	Reason string `json:"reason,omitempty"`
	// Then is what is to be done for it to be in force.
	Then string `json:"then,omitempty"`
}

// Ask is what a person wants to know or have.
type Ask struct {
	// Knobs are named; none is those whose checks fired, or with All each.
	Knobs []*Knob
	All   bool
	// Given are values that somebody else has chosen; where there are any and no Knobs,
	// they alone are proposed.
	Given []Given
}

// Given is a value for a setting.
type Given struct{ Setting, Value string }

// view is a namespace of a machine, as a knob sees it.
type view struct {
	*Space
	m *Facts
	k *Knob
}

// Plan says what should become of the settings that are asked for. It is pure.
func Plan(m *Facts, ask Ask) (all []Proposal) {
	knobs := ask.Knobs
	if len(knobs) == 0 && len(ask.Given) == 0 {
		knobs = Knobs
	}
	for _, k := range knobs {
		if k.Scope == Proxy {
			all = append(all, m.propose(k, ask)...)
			continue
		}
		for _, s := range m.Spaces {
			v := &view{s, m, k}
			named := len(ask.Knobs) > 0 || ask.All
			if k.Scope == Machine && !s.Node || !named && v.finding() == "" {
				continue
			}
			all = append(all, v.propose()...)
		}
	}
	for _, g := range ask.Given {
		all = append(all, g.propose(m)...)
	}
	return append(all, m.follow(all)...)
}

// propose says what becomes of a given value: in each namespace in which the setting is.
func (g Given) propose(m *Facts) (all []Proposal) {
	k, err := Find(g.Setting)
	for _, s := range m.Spaces {
		p := Proposal{Setting: g.Setting, Space: s.Name, Wanted: g.Value}
		if why := useless(g.Setting); why != "" {
			p.Wanted, p.Status, p.Reason = "", Enough, why
			return []Proposal{p}
		}
		if err != nil {
			p.Status, p.Reason = Unknown, err.Error()
			return []Proposal{p}
		}
		if k.Scope == Machine && !s.Node {
			continue
		}
		v, w := &view{s, m, k}, wish{g.Setting, g.Value, false}
		p.ID, p.Scope, p.Current, p.Finding = k.ID, k.Scope, s.Values[g.Setting], v.finding()
		p.Evidence = v.seen(p.Finding)
		p.Status, p.Owner, p.Reason = v.judge(w)
		if p.Status == Owned && v.follows(w) {
			p.Field = kubeProxys[w.setting]
		}
		all = append(all, p)
	}
	return all
}

// finding is the check that fired: here, or for the whole machine anywhere.
func (v *view) finding() string {
	for _, check := range v.k.Checks {
		if len(v.seen(check)) > 0 {
			return check
		}
	}
	return ""
}

// seen is what a check saw.
func (v *view) seen(check string) (evidence []string) {
	if v.k.Scope != Machine {
		return v.Found[check]
	}
	for _, s := range v.m.Spaces {
		for _, e := range s.Found[check] {
			evidence = append(evidence, s.Name+": "+e)
		}
	}
	for _, s := range v.m.Elsewhere {
		if s.Check == check {
			evidence = append(evidence, s.Space+": "+s.Value)
		}
	}
	return evidence
}

func (v *view) propose() (all []Proposal) {
	wishes, why := v.k.want(v)
	p := Proposal{ID: v.k.ID, Scope: v.k.Scope, Space: v.Name, Finding: v.finding(), Setting: v.k.Settings[0], Current: v.Values[v.k.Settings[0]]}
	p.Evidence = v.seen(p.Finding)
	if why != "" {
		p.Status, p.Reason = Enough, why
		if err := v.Unread[p.Setting]; err != nil {
			p.Status, p.Reason = Unknown, err.Error()
		}
		return []Proposal{p}
	}
	for _, w := range wishes {
		p := p
		p.Setting, p.Wanted, p.AtLeast = w.setting, w.value, w.atLeast
		p.Current = v.Values[w.setting]
		p.Status, p.Owner, p.Reason = v.judge(w)
		if p.Status == Owned && v.follows(w) {
			p.Field = kubeProxys[w.setting]
		}
		all = append(all, p)
	}
	// What goes together is done together, or not at all.
	if i := slices.IndexFunc(all, func(p Proposal) bool { return p.Status == Owned || p.Status == Unknown }); i >= 0 {
		for j := range all {
			if all[j].Status == Change {
				all[j].Status, all[j].Field = all[i].Status, all[i].Field
				all[j].Reason = "it goes with " + all[i].Setting + ", which cannot be set: " + all[i].Reason
				if all[i].Field != "" {
					all[j].Reason = "it goes with " + all[i].Setting + ", which follows " + all[i].Field
				}
			}
		}
	}
	return all
}

// judge says whether a setting is to be set.
func (v *view) judge(w wish) (status Status, owner, reason string) {
	current, read := v.Values[w.setting]
	if !read {
		if err := v.Unread[w.setting]; err != nil {
			return Unknown, "", err.Error()
		}
		return Unknown, "", "it was not read"
	}
	if w.suits(current) {
		return Enough, "", "it is so already"
	}
	if owner, ask := v.owner(w, current); owner != "" {
		return Owned, owner, ask
	}
	return Change, "", ""
}

// suits says whether a value is as good as the one that is wished for.
func (w wish) suits(value string) bool { return Suits(w.value, value, w.atLeast) }

// Suits says whether a value that is found is as good as the wanted one. Of several
// numbers each counts.
func Suits(wanted, found string, atLeast bool) bool {
	if wanted == found || !atLeast {
		return wanted == found
	}
	w, f := strings.Fields(wanted), strings.Fields(found)
	if len(w) != len(f) {
		return false
	}
	for i := range w {
		a, err := strconv.ParseInt(w[i], 10, 64)
		b, err2 := strconv.ParseInt(f[i], 10, 64)
		if err != nil || err2 != nil || b < a {
			return false
		}
	}
	return true
}

// owner is who else sets a setting, and whom to ask; nobody if it is free.
func (v *view) owner(w wish, current string) (owner, ask string) {
	held, is := v.Held[w.setting]
	switch {
	case is && !held.Ours:
		return held.Owner, "millrace's agent keeps it so: change it there"
	case is && held.Wrote != current && !held.Again:
		return "somebody unknown", fmt.Sprintf("millrace tune had set it to %s, and somebody has set it to %s since: find out who, or let go of it: millrace tune undo %s", held.Wrote, current, v.k.ID)
	}
	if held.Theirs {
		return "somebody with `millrace tune apply`", fmt.Sprintf("it was set to %s by hand, and is not kept: ask them, or let go of it: millrace tune undo %s", held.Wrote, held.Owner)
	}
	if v.k.Scope == Proxy {
		if v.m.Proxy.Owner != "" {
			return v.m.Proxy.Owner, fmt.Sprintf("it would put back what is set here: change %s to %s %s", w.setting, w.value, v.m.Proxy.Where)
		}
		return "", ""
	}
	if ask := v.kubeProxys(w); ask != "" {
		return fmt.Sprintf("kube-proxy (process %d)", v.m.KubeProxy), ask
	}
	for _, line := range v.Files[w.setting] {
		if !w.suits(line[1]) {
			return line[0], fmt.Sprintf("it sets it to %s, at the next start of the machine at the latest: ask who wrote it, and change it there", line[1])
		}
	}
	if kind, is := strings.CutSuffix(w.setting, "/qdisc"); is && !strings.HasPrefix(current, "default ") {
		return "somebody unknown", fmt.Sprintf("somebody has chosen %s for %s: ask them, or take it away (tc qdisc del dev %s root)", current, kind, kind)
	}
	if strings.HasSuffix(w.setting, "ps_cpus") && current != "0" && !is {
		return "somebody unknown", fmt.Sprintf("a new device has 0, so that the driver, a script or a person has set this to %s: ask them, or put it back first", current)
	}
	if fresh, known := v.Fresh[w.setting]; known && !is && v.k.Scope == Namespace && fresh != current {
		who := "the pod's securityContext.sysctls, the CNI plug-in tuning, or a process in it"
		if v.Node {
			who = "a script or a person"
		}
		return "somebody unknown", fmt.Sprintf("a new namespace has %s, so that somebody has set this to %s (%s): ask them, or put it back first", fresh, current, who)
	}
	return "", ""
}

// number is a setting that is one.
func (v *view) number(name string) int64 {
	n, err := strconv.ParseInt(v.Values[name], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// read says whether a setting was read.
func (v *view) read(name string) bool { _, is := v.Values[name]; return is }

// power is the least power of two that is not less.
func power(n float64) int64 {
	p := int64(1)
	for float64(p) < n && p < 1<<40 {
		p *= 2
	}
	return p
}

// powerBelow is the greatest power of two that is not more.
func powerBelow(n float64) int64 {
	p := int64(1)
	for float64(2*p) <= n {
		p *= 2
	}
	return p
}

func text(n int64) string { return strconv.FormatInt(n, 10) }

func atLeast(setting string, n int64) []wish { return []wish{{setting, text(n), true}} }

// span is a range of ports.
type span struct{ first, last int }

// spans reads "8080,30000-32767".
func spans(list string) (all []span) {
	for part := range strings.SplitSeq(list, ",") {
		from, to, isRange := strings.Cut(strings.TrimSpace(part), "-")
		first, err := strconv.Atoi(from)
		if err != nil {
			continue
		}
		s := span{first, first}
		if isRange {
			if s.last, err = strconv.Atoi(to); err != nil {
				continue
			}
		}
		all = append(all, s)
	}
	return all
}

// joined is how the kernel writes ranges of ports: in order, neighbours as one.
func joined(all []span) string {
	all = slices.SortedFunc(slices.Values(all), func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var merged []span
	for _, s := range all {
		if n := len(merged); n > 0 && s.first <= merged[n-1].last+1 {
			merged[n-1].last = max(merged[n-1].last, s.last)
			continue
		}
		merged = append(merged, s)
	}
	var parts []string
	for _, s := range merged {
		if s.first == s.last {
			parts = append(parts, strconv.Itoa(s.first))
		} else {
			parts = append(parts, fmt.Sprintf("%d-%d", s.first, s.last))
		}
	}
	return strings.Join(parts, ",")
}

// ports are those that programs of the namespace listen at, in order.
func (v *view) ports() []uint16 { return slices.Sorted(maps.Keys(v.Backlogs)) }
