package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/model"
)

func benchPathCommand(s *settings) *cobra.Command {
	var options bench.PathOptions
	c := command(&cobra.Command{
		Use:   "path",
		Short: "What goes between pods of two nodes, in VXLAN and as it is",
		Long: `
Connections, requests and small UDP packets between pods of two nodes on one segment:
by routes of the nodes' stacks as they are, by the kernel's VXLAN with routes as flannel
has them, and by VXLAN written by eBPF, towards the pod by the node's end of its veth or
past it. All have their turn in every round, in random order, on one core; a ratio is
that to another way in the same round. Every UDP packet must arrive.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		p := newProgress()
		options.Progress = p
		options.Attach = map[string]bench.PathAttach{bench.MillraceVXLAN: attachPath, bench.MillracePeer: attachPath}
		report, err := bench.Path(ctx, options)
		p.done()
		if err != nil {
			return err
		}
		return s.show(report, report.WritePathTable, report.PathFailed(), "operations through millrace failed: the figures do not count")
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.PathRoundTime, "how long a turn lasts, all operations together")
	return c
}

// attachPath starts the process that serves routes.
func attachPath(spec bench.PathSpec) (func() error, error) {
	s, err := startApart("path", spec)
	if err != nil {
		return nil, err
	}
	return s.close, nil
}

// servePath has VXLAN in force between two nodes until its input ends.
func servePath(in io.Reader, out io.Writer) error {
	var spec bench.PathSpec
	var layers []*route.Layer
	err := serveUntilEnd(in, out, &spec, func() (err error) {
		layers, err = openPath(spec)
		return err
	})
	for _, l := range layers {
		err = errors.Join(err, l.Close())
	}
	return err
}

// openPath has the layer at work on both nodes.
func openPath(spec bench.PathSpec) (layers []*route.Layer, err error) {
	if err := mountOwnPins(); err != nil {
		return nil, err
	}
	cluster := &model.Snapshot{Number: 1, Complete: true}
	for i := range spec.Nodes {
		cluster.Nodes = append(cluster.Nodes, &model.Node{Name: fmt.Sprintf("n%d", i+1), Addresses: []netip.Addr{spec.Addresses[i]}, PodCIDRs: []netip.Prefix{spec.Ranges[i]}})
	}
	for i, n := range cluster.Nodes {
		l := route.New(route.Settings{Node: n.Name, Mode: route.ModeVXLAN, Peer: spec.Variant == bench.MillracePeer, Netns: spec.Nodes[i], Pins: fmt.Sprintf("%s/route%d", ownPins, i)})
		if err := l.Open(); err != nil {
			return layers, err
		}
		layers = append(layers, l)
		have, err := l.Read()
		if err != nil {
			return layers, err
		}
		want := l.Plan(cluster)
		if _, _, err := l.Apply(have, want, l.Diff(have, want, true)); err != nil {
			return layers, err
		}
		if err := l.Settle(); err != nil {
			return layers, err
		}
	}
	return layers, nil
}
