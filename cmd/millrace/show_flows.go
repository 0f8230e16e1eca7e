package main

import (
	"cmp"
	"context"
	"fmt"
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
}

// mostPairs bounds what is kept; what has no room is added up in one line.
const mostPairs = 10_000

func showFlowsCommand(s *settings) *cobra.Command {
	var at place
	var from wishes
	c := command(&cobra.Command{
		Use:   "flows",
		Short: "Open TCP connections by who speaks to whom: bytes, retransmissions, round-trip times",
		Long: `
Reads the sockets of every network namespace on this node as they are now, and adds
them up by client, server and port. Both ends of a connection between two pods of
this node are listed, each as it sees it. Needs CAP_SYS_ADMIN and CAP_SYS_PTRACE.`,
	}, readsOnly, func(ctx context.Context, _ []string) error {
		known, err := readNames(ctx, &at, &from)
		if err != nil {
			return err
		}
		flows, err := readFlows(known)
		if err != nil {
			return err
		}
		return printFlows(s, flows)
	}, exitPrivilege)
	at.flagRun(c)
	at.flagNode(c)
	from.flagsAs(c, "where names of pods and Services come from, without an agent: "+sourceForms)
	return c
}

// readFlows adds up the connections of all namespaces.
func readFlows(known *names) ([]*flowSum, error) {
	places, _, _, err := doctor.This().Places()
	if err != nil {
		return nil, err
	}
	sums := map[pair]*flowSum{}
	for _, p := range places {
		err := netns.In(p.Path, func() error {
			listening := map[uint16]bool{}
			err := sockdiag.Walk(unix.IPPROTO_TCP, func(s sockdiag.State) {
				if s.State == unix.BPF_TCP_LISTEN {
					listening[s.Local.Port()] = true
				}
			})
			if err != nil {
				return err
			}
			return sockdiag.Walk(unix.IPPROTO_TCP, func(s sockdiag.State) { addFlow(sums, p.Name, s, listening) })
		})
		if err != nil && len(places) == 1 {
			return nil, err
		} // otherwise it has gone meanwhile
	}
	flows := slices.Collect(maps.Values(sums))
	for _, f := range flows {
		f.ClientName, f.ServerName = known.nameOf(f.Client), known.nameOf(f.Server.Addr())
	}
	slices.SortFunc(flows, func(a, b *flowSum) int {
		return cmp.Or(cmp.Compare(b.Sent+b.Received, a.Sent+a.Received), cmp.Compare(b.Connections, a.Connections), cmp.Compare(a.Namespace, b.Namespace),
			a.Client.Compare(b.Client), a.Server.Compare(b.Server))
	})
	return flows, nil
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
	if sums[key] == nil && len(sums) >= mostPairs {
		key = pair{Namespace: "others"}
	}
	f := sums[key]
	if f == nil {
		f = &flowSum{pair: key}
		sums[key] = f
	}
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

func printFlows(s *settings, flows []*flowSum) error {
	if s.json() {
		return printJSON(map[string]any{"flows": append([]*flowSum{}, flows...)})
	}
	t := newTable(os.Stdout, "NAMESPACE", "CLIENT", "SERVER", "OPEN", "OPENING", "STALLED", "SENT", "RECEIVED", "RETRANSMITS", "LONGEST RTT")
	for _, f := range flows {
		t.row(f.Namespace, endText(netip.AddrPortFrom(f.Client, 0), f.ClientName), endText(f.Server, f.ServerName), fmt.Sprint(f.Connections),
			fmt.Sprint(f.Opening), fmt.Sprint(f.Stalled), bytesText(f.Sent), bytesText(f.Received), fmt.Sprint(f.Retransmits),
			f.Longest.Round(10*time.Microsecond).String())
	}
	return t.print()
}
