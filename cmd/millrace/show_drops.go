package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
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
	Reason    string `json:"reason"`
	// Function is where in the kernel; empty without the right to know.
	Function    string         `json:"function,omitempty"`
	Device      string         `json:"device,omitempty"`
	Protocol    string         `json:"protocol,omitempty"`
	Source      netip.AddrPort `json:"source"`
	Destination netip.AddrPort `json:"destination"`
	// SourceName and DestinationName are whose the addresses are.
	SourceName      string  `json:"source_name,omitempty"`
	DestinationName string  `json:"destination_name,omitempty"`
	Count           uint64  `json:"count"`
	LastSeconds     float64 `json:"last_seconds_ago"`
	usual           bool
}

// dropReport is all of `show drops`.
type dropReport struct {
	// Always says that the agent's programs counted, not those of this command.
	Always bool              `json:"always"`
	Drops  []drop            `json:"drops"`
	Totals map[string]uint64 `json:"totals"`
	// Folded are those of reasons for which packets die where all is well, too.
	Folded uint64 `json:"folded"`
	// Lost are in the totals, but of them no more is known.
	Lost    uint64   `json:"lost"`
	Missing []string `json:"missing"`
}

// everything is the argument that shows what is folded otherwise.
const everything = "all"

func showDropsCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	var window time.Duration
	c := command(&cobra.Command{
		Use:   "drops [all]",
		Short: "Packets that died, by reason, namespace and port",
		Long: `
Reads what the agent's programs have counted since they were first attached, also
while no agent runs. With --for, and where no agent counts, it counts by itself for
that time. Reasons for which packets die where all is well are left out, unless
all is said. Functions of the kernel are named with CAP_SYSLOG only.
Needs CAP_BPF, and to count by itself CAP_PERFMON.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 || len(args) == 1 && args[0] != everything {
				return usage("say nothing or all after drops")
			}
			return nil
		},
	}, readsOnly, func(ctx context.Context, args []string) error {
		known, err := readNames(ctx, &at, &from)
		if err != nil {
			return err
		}
		r := &dropReport{Drops: []drop{}, Totals: map[string]uint64{}, Missing: []string{}}
		if err := r.count(ctx, &at, window); err != nil {
			return err
		}
		return r.show(s, known, len(args) == 1)
	}, exitUnavailable, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagNode(c)
	from.flagsAs(c, "where names of pods and Services come from, without an agent: "+sourceForms)
	flagFor(c, &window, 0, "count for this time, instead of reading what the agent's programs have counted")
	return c
}

// count reads what was counted, or counts for a time.
func (r *dropReport) count(ctx context.Context, at *place, window time.Duration) error {
	var now unix.Timespec
	recording, err := at.trace().Counted()
	r.Always = err == nil && window == 0
	if err != nil && !errors.Is(err, fs.ErrNotExist) && window == 0 {
		return err
	}
	if !r.Always {
		if window == 0 {
			window = 5 * time.Second
		}
		if recording, err = countFor(ctx, window); err != nil {
			return err
		}
		now = unix.NsecToTimespec(window.Nanoseconds())
	} else if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	places, _, _, err := doctor.This().Places()
	if err != nil {
		return err
	}
	spaces := map[uint32]string{}
	for _, p := range places {
		spaces[p.Inode] = p.Name
	}
	for _, e := range recording.Events {
		if e.Kind != cause.Drop {
			continue
		}
		d := drop{
			Namespace: spaces[e.Space], Reason: e.Reason, Function: e.Location, Device: e.Device, Protocol: protocolName(e.Tuple.Protocol),
			Source: e.Tuple.Source, Destination: e.Tuple.Destination, Count: e.Count,
			LastSeconds: max(0, (time.Duration(now.Nano()) - e.Last).Seconds()), usual: cause.Usual(&e),
		}
		if d.Namespace == "" {
			d.Namespace = fmt.Sprintf("net:[%d]", e.Space) // it has gone
		}
		r.Drops = append(r.Drops, d)
	}
	for _, t := range recording.Totals {
		if t.Kind == cause.Drop {
			r.Totals[t.Reason] += t.Count
		}
	}
	r.Lost, r.Missing = recording.Lost, append(r.Missing, recording.Missing...)
	return nil
}

func countFor(ctx context.Context, window time.Duration) (*trace.Recording, error) {
	p := newProgress()
	defer p.done()
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
	session, err := trace.Watch(o)
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

func (r *dropReport) show(s *settings, known *names, all bool) error {
	slices.SortFunc(r.Drops, func(a, b drop) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.LastSeconds, b.LastSeconds))
	})
	if !all {
		r.Drops = slices.DeleteFunc(r.Drops, func(d drop) bool {
			if d.usual {
				r.Folded += d.Count
			}
			return d.usual
		})
	}
	for i := range r.Drops {
		d := &r.Drops[i]
		d.SourceName, d.DestinationName = known.nameOf(d.Source.Addr()), known.nameOf(d.Destination.Addr())
	}
	if s.json() {
		return printJSON(r)
	}
	t := newTable(os.Stdout, "COUNT", "LAST", "REASON", "FUNCTION", "NAMESPACE", "DEVICE", "PROTOCOL", "FROM", "TO")
	for _, d := range r.Drops {
		last := time.Duration(d.LastSeconds * float64(time.Second)).Round(time.Second).String()
		t.row(fmt.Sprint(d.Count), last+" ago", orDash(d.Reason), orDash(d.Function), d.Namespace, orDash(d.Device), orDash(d.Protocol),
			endText(d.Source, d.SourceName), endText(d.Destination, d.DestinationName))
	}
	if err := t.print(); err != nil {
		return err
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
