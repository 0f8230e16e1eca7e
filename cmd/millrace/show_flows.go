package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/doctor"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/layer/trace/cause"
)

// pair is who speaks to whom: the side of the client, its server and the port of it,
// seen from one of both ends.
type pair struct {
	Namespace string         `json:"namespace"`
	Client    netip.Addr     `json:"client"`
	Server    netip.AddrPort `json:"server"`
}

// flowSum adds up the open connections of a pair.
type flowSum struct {
	pair
	ClientName  string `json:"client_name,omitempty"`
	ServerName  string `json:"server_name,omitempty"`
	Connections int    `json:"connections"`
	// Opening are those that wait for the answer to their SYN, Stalled those that send
	// again, or wait for a window that is zero.
	Opening int `json:"opening"`
	Stalled int `json:"stalled"`
	// Sent was acknowledged by the other end.
	Sent        uint64 `json:"sent_bytes"`
	Received    uint64 `json:"received_bytes"`
	Retransmits uint64 `json:"retransmits"`
	// Longest is the longest of the round-trip times.
	Longest time.Duration `json:"longest_rtt_ns"`
	// Ended are connections that are over, Refused those of them that met a port where
	// nobody listens, Unanswered those that got no answer to their first packet or none
	// any more, Reset those that the other end broke off. What they sent is in the sums
	// above. The agent's programs count them.
	Ended      uint64 `json:"ended"`
	Refused    uint64 `json:"refused"`
	Unanswered uint64 `json:"unanswered"`
	Reset      uint64 `json:"reset"`
	// Verdict is ok, refused, unanswered, retransmitting, or "dropped" with the reason.
	Verdict string `json:"verdict"`
	// dropped is the reason for which a packet of it died in the last minute.
	dropped string
}

// flowReport is all of `show flows`.
type flowReport struct {
	// Ended says that connections that have ended are among them: an agent counts.
	Ended bool       `json:"ended"`
	Flows []*flowSum `json:"flows"`
	// Lost are connections that have ended and of which no more is known.
	Lost uint64 `json:"lost"`
}

// mostPairs bounds what is kept; what has no room is added up in one line.
const mostPairs = 10_000

func showFlowsCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	c := command(&cobra.Command{
		Use:   "flows [live]",
		Short: "TCP connections by who speaks to whom: how they do, bytes, retransmissions, round-trip times",
		Long: `
Reads the sockets of every network namespace on this node as they are now, and adds
them up by client, server and port, with the connections that have ended, as far as
the agent's programs have counted them. Both ends of a connection between two pods of
this node are listed, each as it sees it. With live it goes on, and says each second
what has moved; with -o json as one object for each second. Needs CAP_SYS_ADMIN and
CAP_SYS_PTRACE, and CAP_BPF for what has ended.`,
		Args: words("flows", live),
	}, readsOnly, func(ctx context.Context, args []string) error {
		known, err := readNames(ctx, &at, &from)
		if err != nil {
			return err
		}
		if slices.Contains(args, live) {
			return watchFlows(ctx, s, &at, known)
		}
		r, err := readFlows(&at, known)
		if err != nil {
			return err
		}
		return printFlows(s, r)
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	at.flagNode(c)
	from.flagsAs(c, "where names of pods and Services come from, without an agent: "+sourceForms)
	return c
}

// readFlows adds up the connections of all namespaces, and those that have ended.
func readFlows(at *place, known *names) (*flowReport, error) {
	places, _, _, err := doctor.This().Places()
	if err != nil {
		return nil, err
	}
	sums := map[pair]*flowSum{}
	spaces := map[uint32]string{}
	for _, p := range places {
		spaces[p.Inode] = p.Name
		err := netns.In(p.Path, func() error { return addOpen(sums, p.Name) })
		if err != nil && len(places) == 1 {
			return nil, err
		} // otherwise it has gone meanwhile
	}
	r := &flowReport{Flows: []*flowSum{}}
	if err := r.addEnded(at, sums, spaces); err != nil {
		return nil, err
	}
	r.Flows = slices.AppendSeq(r.Flows, maps.Values(sums))
	for _, f := range r.Flows {
		f.ClientName, f.ServerName = known.nameOf(f.Client), known.nameOf(f.Server.Addr())
		f.Verdict = f.verdict()
	}
	slices.SortFunc(r.Flows, func(a, b *flowSum) int {
		return cmp.Or(cmp.Compare(b.Sent+b.Received, a.Sent+a.Received), cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Namespace, b.Namespace),
			a.Client.Compare(b.Client), a.Server.Compare(b.Server))
	})
	return r, nil
}

// addOpen adds the open connections of the calling thread's namespace.
func addOpen(sums map[pair]*flowSum, namespace string) error {
	listening, err := sockdiag.Ports()
	if err != nil {
		return err
	}
	return sockdiag.Walk(unix.IPPROTO_TCP, func(s sockdiag.State) { addFlow(sums, namespace, s, listening) })
}

// dropsCount is how long a packet that died is held against its flow.
const dropsCount = time.Minute

// addEnded adds what the agent's programs have counted, where they do.
func (r *flowReport) addEnded(at *place, sums map[pair]*flowSum, spaces map[uint32]string) error {
	recording, err := at.trace().Counted()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r.Ended, r.Lost = true, recording.FlowsLost
	name := func(inode uint32) string {
		if spaces[inode] == "" {
			return fmt.Sprintf("net:[%d]", inode) // it has gone
		}
		return spaces[inode]
	}
	for _, of := range recording.Flows {
		f := sumOf(sums, pair{name(of.Space), of.Client, of.Server})
		f.Ended, f.Refused, f.Unanswered, f.Reset = f.Ended+of.Ended, f.Refused+of.Refused, f.Unanswered+of.Unanswered, f.Reset+of.Reset
		f.Sent, f.Received, f.Retransmits = f.Sent+of.Sent, f.Received+of.Received, f.Retransmits+of.Retransmits
		f.Longest = max(f.Longest, of.Longest)
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("read the clock: %w", err)
	}
	dropped := map[[2]netip.Addr]map[uint16]string{} // by the ends, and the port of either
	for i := range recording.Events {
		e := &recording.Events[i]
		if e.Kind != cause.Drop || cause.Usual(e) || e.Tuple.Protocol != unix.IPPROTO_TCP || time.Duration(now.Nano())-e.Last > dropsCount {
			continue
		}
		from, to := e.Tuple.Source, e.Tuple.Destination
		for _, way := range [][2]netip.AddrPort{{from, to}, {to, from}} {
			ends := [2]netip.Addr{way[0].Addr(), way[1].Addr()}
			if dropped[ends] == nil {
				dropped[ends] = map[uint16]string{}
			}
			dropped[ends][way[1].Port()] = cmp.Or(e.Reason, e.Location)
		}
	}
	for _, f := range sums {
		f.dropped = dropped[[2]netip.Addr{f.Client, f.Server.Addr()}][f.Server.Port()]
	}
	return nil
}

// verdict says how connections do: by those that are open now, and by those that have
// ended, if at least half of them did so. A server that is not there refuses: the packet
// that died of that is not another cause.
func (f *flowSum) verdict() string {
	most := func(n uint64) bool { return n > 0 && 2*n >= f.Ended }
	suffers := f.Opening+f.Stalled > 0 || most(f.Unanswered) || most(f.Reset)
	switch {
	case most(f.Refused) && f.Connections == 0:
		return "refused"
	case suffers && f.dropped != "":
		return "dropped " + f.dropped
	case f.Opening > 0 && f.Opening == f.Connections || most(f.Unanswered) && f.Connections == 0:
		return "unanswered"
	case f.Stalled > 0:
		return "retransmitting"
	case most(f.Reset) && f.Connections == 0:
		return "reset"
	}
	return "ok"
}

// less is what has come to the counts since an earlier look; false if nothing has.
func (f *flowSum) less(before *flowSum) bool {
	if before == nil {
		return true
	}
	take := func(now *uint64, then uint64) { *now -= min(*now, then) }
	take(&f.Ended, before.Ended)
	take(&f.Refused, before.Refused)
	take(&f.Unanswered, before.Unanswered)
	take(&f.Reset, before.Reset)
	take(&f.Sent, before.Sent)
	take(&f.Received, before.Received)
	take(&f.Retransmits, before.Retransmits)
	f.Verdict = f.verdict()
	return f.Ended+f.Sent+f.Received+f.Retransmits > 0 || f.Opening+f.Stalled > 0
}

// watchFlows says each second what has moved, until ctx ends.
func watchFlows(ctx context.Context, s *settings, at *place, known *names) error {
	before := map[pair]*flowSum{}
	for first, tick := true, time.NewTicker(watchEvery); ; first = false {
		r, err := readFlows(at, known)
		if err != nil {
			return err
		}
		now := map[pair]*flowSum{}
		r.Flows = slices.DeleteFunc(r.Flows, func(f *flowSum) bool {
			whole := *f
			now[f.pair] = &whole
			return !f.less(before[f.pair])
		})
		before = now
		switch {
		case first || len(r.Flows) == 0:
		case s.json():
			if err := json.NewEncoder(os.Stdout).Encode(map[string]any{"time": time.Now().UTC(), "flows": r.Flows, "lost": r.Lost}); err != nil {
				return err
			}
		default:
			fmt.Println(time.Now().Format(time.TimeOnly))
			if err := printFlows(s, r); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

func addFlow(sums map[pair]*flowSum, namespace string, s sockdiag.State, listening map[uint16]bool) {
	switch s.State {
	case unix.BPF_TCP_LISTEN, unix.BPF_TCP_TIME_WAIT, unix.BPF_TCP_CLOSE:
		return
	}
	key := pair{namespace, s.Local.Addr(), s.Remote}
	if listening[s.Local.Port()] {
		key = pair{namespace, s.Remote.Addr(), s.Local}
	}
	f := sumOf(sums, key)
	f.Connections++
	if s.State == unix.BPF_TCP_SYN_SENT {
		f.Opening++
	} else if s.Timer == sockdiag.TimerProbe || s.Timer == sockdiag.TimerRetransmit && s.Tries > 0 {
		f.Stalled++
	}
	f.Sent += s.BytesAcked
	f.Received += s.BytesReceived
	f.Retransmits += s.TotalRetransmits
	f.Longest = max(f.Longest, s.RTT)
}

// sumOf is the sum of a pair; that of all others where there is no room for it.
func sumOf(sums map[pair]*flowSum, key pair) *flowSum {
	if sums[key] == nil && len(sums) >= mostPairs {
		key = pair{Namespace: "others"}
	}
	if sums[key] == nil {
		sums[key] = &flowSum{pair: key}
	}
	return sums[key]
}

func printFlows(s *settings, r *flowReport) error {
	if s.json() {
		return printJSON(r)
	}
	t := newTable(os.Stdout, "NAMESPACE", "CLIENT", "SERVER", "VERDICT", "OPEN", "OPENING", "STALLED", "ENDED", "REFUSED", "UNANSWERED", "RESET", "SENT", "RECEIVED",
		"RETRANSMITS", "LONGEST RTT")
	for _, f := range r.Flows {
		t.row(f.Namespace, endText(netip.AddrPortFrom(f.Client, 0), f.ClientName), endText(f.Server, f.ServerName), f.Verdict, fmt.Sprint(f.Connections),
			fmt.Sprint(f.Opening), fmt.Sprint(f.Stalled), fmt.Sprint(f.Ended), fmt.Sprint(f.Refused), fmt.Sprint(f.Unanswered), fmt.Sprint(f.Reset),
			bytesText(f.Sent), bytesText(f.Received), fmt.Sprint(f.Retransmits), f.Longest.Round(10*time.Microsecond).String())
	}
	if err := t.print(); err != nil {
		return err
	}
	if !r.Ended {
		fmt.Println("not seen: connections that have ended, for no agent counts them here")
	}
	if r.Lost > 0 {
		fmt.Printf("not shown: %d that have ended, for which there was no room\n", r.Lost)
	}
	return nil
}
