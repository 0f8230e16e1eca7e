package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/layer/trace"
	"github.com/millrace/millrace/layer/trace/cause"
)

// drop is the JSON form of packets that died of one reason at one place, of one kind.
type drop struct {
	Namespace string `json:"namespace"`
	// Pod is whose the namespace is, NAMESPACE/NAME, where that is known.
	Pod    string `json:"pod,omitempty"`
	Reason string `json:"reason"`
	// Function is where in the kernel; empty without the right to know.
	Function    string         `json:"function,omitempty"`
	Device      string         `json:"device,omitempty"`
	Protocol    string         `json:"protocol,omitempty"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	// SourceName and DestinationName are whose the addresses are, Service the Service and
	// its port that the packet was for, or came from.
	SourceName      string  `json:"source_name,omitempty"`
	DestinationName string  `json:"destination_name,omitempty"`
	Service         string  `json:"service,omitempty"`
	Count           uint64  `json:"count"`
	LastSeconds     float64 `json:"last_seconds_ago"`
	// Stack are the functions that led there, Length of the packet and Flags of TCP; of an
	// example.
	Stack  []string `json:"stack,omitempty"`
	Length int      `json:"length,omitempty"`
	Flags  string   `json:"flags,omitempty"`
	usual  bool
}

// dropReport is all of `show drops`.
type dropReport struct {
	// Always says that the agent's programs counted, not those of this command.
	Always bool   `json:"always"`
	Drops  []drop `json:"drops"`
	// Examples are the last packets that died, at most a few of a second, the newest first.
	Examples []drop            `json:"examples,omitempty"`
	Totals   map[string]uint64 `json:"totals"`
	// Folded are those of reasons for which packets die where all is well, too.
	Folded uint64 `json:"folded"`
	// Lost are in the totals, but of them no more is known.
	Lost    uint64   `json:"lost"`
	Missing []string `json:"missing"`
}

// everything is the argument that shows what is folded otherwise, live the one that goes on.
const (
	everything = "all"
	live       = "live"
)

// words lets a command have these arguments.
func words(what string, allowed ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		for i, arg := range args {
			if !slices.Contains(allowed, arg) || slices.Contains(args[:i], arg) {
				return usage("say nothing or %s after %s", strings.Join(allowed, ", "), what)
			}
		}
		return nil
	}
}

// watchEvery is how often what goes on is shown anew.
const watchEvery = time.Second

func showDropsCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var window time.Duration
	c := command(&cobra.Command{
		Use:   "drops [all] [live]",
		Short: "Packets that died, by reason, namespace and port",
		Long: `
Reads what the agent's programs have counted since they were first attached, also
while no agent runs, and the last examples that they kept. With --for, and where no
agent counts, it counts by itself for that time. With live it goes on, and says each
second what has died in it; with -o json as one object for each second. Reasons
for which packets die where all is well are left out, unless all is said.
Functions of the kernel are named with CAP_SYSLOG only. Needs CAP_BPF, and to count
by itself CAP_PERFMON.`,
		Args: words("drops", everything, live),
	}, readsOnly, func(ctx context.Context, args []string) error {
		known, err := readNames(ctx, &at, &from)
		if err != nil {
			return err
		}
		v := &dropView{settings: s, at: &at, known: known, window: window, all: slices.Contains(args, everything)}
		if slices.Contains(args, live) {
			return v.watch(ctx)
		}
		return v.once(ctx)
	}, exitUnavailable, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagNode(c)
	from.flagsAs(c, "where names of pods and Services come from, without an agent: "+sourceForms)
	flagFor(c, &window, 0, "count for this time, instead of reading what the agent's programs have counted")
	return c
}

// dropView shows drops as one call asks for them.
type dropView struct {
	*settings
	at     *place
	known  *names
	window time.Duration
	// all shows those, too, that die where all is well.
	all bool
	// spaces are the namespaces, pods whose they are; read again where one is not known.
	spaces, pods map[uint32]string
}

// once reads what was counted, or counts for a time, and shows it.
func (v *dropView) once(ctx context.Context) error {
	recording, always, err := v.counted(ctx)
	if err != nil {
		return err
	}
	now, err := v.now(always)
	if err != nil {
		return err
	}
	r, err := v.report(recording, now)
	if err != nil {
		return err
	}
	r.Always = always
	return v.show(r)
}

// counted are the agent's counts, or those of this command.
func (v *dropView) counted(ctx context.Context) (r *trace.Recording, always bool, err error) {
	if v.window == 0 {
		r, err = v.at.trace().Counted()
		if !errors.Is(err, fs.ErrNotExist) {
			return r, true, err
		}
		v.window = 5 * time.Second
	}
	r, err = countFor(ctx, v.window)
	return r, false, err
}

// now is what times of events are compared with.
func (v *dropView) now(always bool) (time.Duration, error) {
	if !always {
		return v.window, nil
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return 0, fmt.Errorf("read the clock: %w", err)
	}
	return time.Duration(now.Nano()), nil
}

// name finds out what the namespaces of drops are called, and whose they are.
func (v *dropView) name(ctx context.Context, events []cause.Event) error {
	known := func(e cause.Event) bool { _, ok := v.spaces[e.Space]; return ok }
	if v.spaces != nil && !slices.ContainsFunc(events, func(e cause.Event) bool { return !known(e) }) {
		return nil
	}
	places, _, _, err := doctor.This().Places()
	if err != nil {
		return err
	}
	if v.spaces == nil {
		v.spaces, v.pods = map[uint32]string{}, map[uint32]string{}
	}
	var spaces []trace.Namespace
	for _, p := range places {
		v.spaces[p.Inode] = p.Name
		spaces = append(spaces, trace.Namespace{Name: p.Name, Path: p.Path, Inode: p.Inode})
	}
	for _, e := range events {
		if !known(e) {
			v.spaces[e.Space] = fmt.Sprintf("net:[%d]", e.Space) // it has gone
		}
	}
	if len(v.known.pods) == 0 {
		return nil
	}
	reader, err := trace.NewReader(spaces)
	if err != nil {
		return err
	}
	addrs, err := reader.Addresses(ctx)
	if err != nil {
		return err
	}
	for inode, of := range addrs {
		for _, a := range of {
			if pod := v.known.pods[a.Prefix.Addr()]; pod != "" {
				v.pods[inode] = pod
			}
		}
	}
	return nil
}

// drop is an event as it is shown; its time is before now.
func (v *dropView) drop(e *cause.Event, now time.Duration) drop {
	d := drop{
		Namespace: v.spaces[e.Space], Pod: v.pods[e.Space], Reason: e.Reason, Function: e.Location, Device: e.Device,
		Protocol: protocolName(e.Tuple.Protocol), Source: e.Tuple.Source, Destination: e.Tuple.Destination, Count: e.Count,
		LastSeconds: max(0, (now - e.Last).Seconds()), usual: cause.Usual(e),
		SourceName: v.known.nameOf(e.Tuple.Source.Addr()), DestinationName: v.known.nameOf(e.Tuple.Destination.Addr()),
	}
	for _, end := range []netip.AddrPort{e.Tuple.Destination, e.Tuple.Source} {
		for _, l := range v.known.leads {
			if d.Service == "" && l.protocol == e.Tuple.Protocol && l.front == end {
				d.Service = l.String()
			}
		}
	}
	return d
}

func (v *dropView) report(recording *trace.Recording, now time.Duration) (*dropReport, error) {
	r := &dropReport{Drops: []drop{}, Totals: map[string]uint64{}, Lost: recording.Lost, Missing: append([]string{}, recording.Missing...)}
	if err := v.name(context.Background(), recording.Events); err != nil {
		return nil, err
	}
	for i := range recording.Events {
		if e := &recording.Events[i]; e.Kind == cause.Drop {
			r.add(v.drop(e, now), v.all)
		}
	}
	for i := range recording.Examples {
		e := &recording.Examples[i]
		if e.Kind != cause.Drop || cause.Usual(e) && !v.all {
			continue
		}
		d := v.drop(e, now)
		d.Stack, d.Length, d.Flags = e.Stack, e.Length, tcpFlags(e.Tuple)
		r.Examples = append(r.Examples, d)
	}
	for _, t := range recording.Totals {
		if t.Kind == cause.Drop {
			r.Totals[t.Reason] += t.Count
		}
	}
	slices.SortFunc(r.Drops, func(a, b drop) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.LastSeconds, b.LastSeconds))
	})
	return r, nil
}

// add adds a row, or only its count, if it dies where all is well.
func (r *dropReport) add(d drop, all bool) {
	if d.usual && !all {
		r.Folded += d.Count
		return
	}
	r.Drops = append(r.Drops, d)
}

// tcpFlags are those that are told apart: "SYN,ACK".
func tcpFlags(t cause.Tuple) string {
	if t.Protocol != unix.IPPROTO_TCP {
		return ""
	}
	var all []string
	for _, f := range []struct {
		bit  uint8
		name string
	}{{2, "SYN"}, {1, "FIN"}, {4, "RST"}, {16, "ACK"}} {
		if t.TCPFlags&f.bit != 0 {
			all = append(all, f.name)
		}
	}
	return strings.Join(all, ",")
}

// watch says each second what has died, until ctx ends or the window is over.
func (v *dropView) watch(ctx context.Context) error {
	look := func() (*trace.Recording, error) { return v.at.trace().Counted() }
	if _, err := look(); errors.Is(err, fs.ErrNotExist) || v.window > 0 {
		session, err := watchDrops()
		if err != nil {
			return err
		}
		defer session.Stop()
		look = session.Look
	} else if err != nil {
		return err
	}
	var over <-chan time.Time
	if v.window > 0 {
		over = time.After(v.window)
	}
	before, err := look()
	if err != nil {
		return err
	}
	for tick := time.NewTicker(watchEvery); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-over:
			return nil
		case <-tick.C:
		}
		now, err := look()
		if err != nil {
			return err
		}
		if err := v.since(before, now); err != nil {
			return err
		}
		before = now
	}
}

// since shows what has died between two looks.
func (v *dropView) since(before, now *trace.Recording) error {
	type kind struct {
		space            uint32
		reason, location string
		device           int
		tuple            cause.Tuple
	}
	of := func(e *cause.Event) kind {
		return kind{e.Space, e.Reason, e.Location, e.Index, e.Tuple}
	}
	had := map[kind]uint64{}
	for i := range before.Events {
		had[of(&before.Events[i])] += before.Events[i].Count
	}
	fresh := &trace.Recording{Lost: now.Lost - min(now.Lost, before.Lost), Totals: now.Totals}
	for _, e := range now.Events {
		n := had[of(&e)]
		if e.Kind != cause.Drop || e.Count == n {
			continue
		}
		if e.Count > n { // else it was forgotten, and met again
			e.Count -= n
		}
		fresh.Events = append(fresh.Events, e)
	}
	r, err := v.report(fresh, 0)
	if err != nil || len(r.Drops) == 0 {
		return err
	}
	if v.json() {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{"time": time.Now().UTC(), "drops": r.Drops, "lost": r.Lost})
	}
	for _, d := range r.Drops {
		fmt.Printf("%s  %6d  %s\n", time.Now().Format(time.TimeOnly), d.Count, d.line())
	}
	return nil
}

// line is a drop in one line.
func (d *drop) line() string {
	why := orDash(d.Reason)
	if d.Function != "" {
		why += " in " + d.Function
	}
	where := d.where()
	if d.Device != "" {
		where += ", " + d.Device
	}
	text := fmt.Sprintf("%s  %s  %s %s > %s", why, where, orDash(d.Protocol), endText(d.Source, d.SourceName), endText(d.Destination, d.DestinationName))
	if d.Service != "" {
		text += "  service " + d.Service
	}
	return text
}

// where is the pod, else the namespace.
func (d *drop) where() string {
	if d.Pod != "" {
		return "pod " + d.Pod
	}
	return d.Namespace
}

// watchDrops counts the drops of this node.
func watchDrops() (*trace.Session, error) {
	places, _, nested, err := doctor.This().Places()
	if err != nil {
		return nil, err
	}
	var o trace.Options
	for _, place := range places {
		if nested {
			o.Namespaces = append(o.Namespaces, place.Inode)
		}
	}
	return trace.Watch(o)
}

func countFor(ctx context.Context, window time.Duration) (*trace.Recording, error) {
	p := newProgress()
	defer p.done()
	session, err := watchDrops()
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(p, "counting drops for %s", window)
	select {
	case <-time.After(window):
	case <-ctx.Done():
	}
	return session.Stop()
}

func protocolName(number uint8) string {
	switch number {
	case 0:
		return ""
	case unix.IPPROTO_ICMP:
		return "icmp"
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMPV6:
		return "icmp6"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return fmt.Sprint(number)
}

// printedExamples is how many are printed for people; machines get all.
const printedExamples = 5

func (v *dropView) show(r *dropReport) error {
	if v.json() {
		return printJSON(r)
	}
	t := newTable(os.Stdout, "COUNT", "LAST", "REASON", "FUNCTION", "NAMESPACE", "DEVICE", "PROTOCOL", "FROM", "TO")
	for _, d := range r.Drops {
		name := d.DestinationName
		if d.Service != "" && strings.HasPrefix(name, "service ") {
			name = "service " + d.Service
		}
		t.row(fmt.Sprint(d.Count), d.ago(), orDash(d.Reason), orDash(d.Function), d.where(), orDash(d.Device), orDash(d.Protocol),
			endText(d.Source, d.SourceName), endText(d.Destination, name))
	}
	if err := t.print(); err != nil {
		return err
	}
	for i, d := range r.Examples[:min(printedExamples, len(r.Examples))] {
		if i == 0 {
			fmt.Println("\nlast examples:")
		}
		fmt.Printf("  %s  %s  %d bytes %s\n", d.ago(), d.line(), d.Length, d.Flags)
		if len(d.Stack) > 0 {
			fmt.Printf("      called by %s\n", strings.Join(d.Stack[:min(6, len(d.Stack))], " < "))
		}
	}
	if r.Folded > 0 {
		fmt.Printf("left out: %d that die where all is well, too; say all to see them\n", r.Folded)
	}
	if r.Lost > 0 {
		fmt.Printf("not shown: %d for which there was no room\n", r.Lost)
	}
	for _, m := range r.Missing {
		fmt.Println("not seen:", m)
	}
	return nil
}

func (d *drop) ago() string {
	return time.Duration(d.LastSeconds*float64(time.Second)).Round(time.Second).String() + " ago"
}

// endText is one end of a packet, "-" where it has none.
func endText(a netip.AddrPort, name string) string {
	if !a.Addr().IsValid() {
		return "-"
	}
	if a.Port() == 0 {
		if name != "" {
			return fmt.Sprintf("%s (%s)", a.Addr(), name)
		}
		return a.Addr().String()
	}
	return named(a, name)
}
