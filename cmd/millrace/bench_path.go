package main

import (
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

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
		if s.json() {
			err = printJSON(report)
		} else {
			err = report.WritePathTable(os.Stdout)
		}
		if err == nil && report.PathFailed() {
			return &failure{exitFindings, errors.New("operations through millrace failed: the figures do not count")}
		}
		return err
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DefaultRounds, "how often each has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.PathRoundTime, "how long a turn lasts, all operations together")
	return c
}

// attachPath starts the process that serves routes, which ends with its input.
func attachPath(spec bench.PathSpec) (func() error, error) {
	// Of its own are the mounts, so that what it pins is gone with it, however it ends.
	s, err := startServer(&unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}, "path")
	if err != nil {
		return nil, fmt.Errorf("start the process that serves routes: %w", err)
	}
	err = s.orders.Encode(spec)
	var answer serveAnswer
	if err == nil {
		err = s.answers.Decode(&answer)
	}
	switch {
	case err != nil:
		return nil, s.lost(err)
	case answer.Error != "":
		return nil, errors.Join(&failure{answer.Status, errors.New(answer.Error)}, s.close())
	}
	return s.close, nil
}

// servePath has VXLAN in force between two nodes until its input ends.
func servePath(in io.Reader, out io.Writer) error {
	var spec bench.PathSpec
	if err := gob.NewDecoder(in).Decode(&spec); err != nil {
		return fmt.Errorf("read what to serve: %w", err)
	}
	layers, err := openPath(spec)
	answer := serveAnswer{}
	if err != nil {
		answer = refusal(err)
	}
	if err := gob.NewEncoder(out).Encode(answer); err != nil {
		return fmt.Errorf("answer the benchmark: %w", err)
	}
	_, err = io.Copy(io.Discard, in)
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
