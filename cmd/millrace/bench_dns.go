package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/dns"
	"github.com/millrace/millrace/model"
)

func benchDNSCommand(s *settings) *cobra.Command {
	var options bench.DNSOptions
	c := command(&cobra.Command{
		Use:   "dns [COREDNS]",
		Short: "What an answer and a lookup cost a pod, beside CoreDNS and unbound",
		Long: `
Asks from pods of one node, each by a veth of its own: millrace in the kernel, and a
CoreDNS and an unbound on the node that have every answer in their caches. One query at
a time; as many as two processors manage, client included; and the lookup of a name
outside the cluster with ndots:5, by glibc, musl and Go, and by a client that sends what
glibc sends. All have their turn in every round, in random order. COREDNS is the path of
a CoreDNS with the plugins bind, cache and forward; without, one is built from the Go
module proxy, once. unbound, cc and musl-gcc are taken where they are installed.`,
		Args: cobra.MaximumNArgs(1),
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		options.CoreDNS = strings.Join(args, "")
		p := newProgress()
		options.Progress, options.Attach = p, attachNames
		report, err := bench.DNS(ctx, options)
		p.done()
		if err != nil {
			return err
		}
		return s.show(report, report.WriteDNSTable, report.DNSFailed(), "lookups through millrace failed: the figures do not count")
	}, exitFindings, exitUnavailable, exitPrivilege)
	c.Flags().IntVar(&options.Rounds, "rounds", bench.DNSRounds, "how often each has its turn; 6 or more give an interval")
	c.Flags().DurationVar(&options.RoundTime, "round-time", bench.DNSRoundTime, "how long a turn lasts, all operations together")
	return c
}

// attachNames starts the process that serves names.
func attachNames(spec bench.DNSSpec) (bench.DNSAttached, error) {
	s, err := startApart("dns", spec)
	if err != nil {
		return bench.DNSAttached{}, err
	}
	return bench.DNSAttached{Pid: s.command.Process.Pid, Close: s.close}, nil
}

// serveNames serves names until its input ends.
func serveNames(ctx context.Context, in io.Reader, out io.Writer) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var spec bench.DNSSpec
	var n *namesServer
	err := serveUntilEnd(in, out, &spec, func() (err error) {
		if n, err = newNames(spec); err != nil {
			return err
		}
		return n.begin(ctx)
	})
	if n != nil {
		err = errors.Join(err, n.layer.Close())
	}
	return err
}

// namesServer is the layer dns at work in a benchmark.
type namesServer struct {
	layer *dns.Layer
	spec  bench.DNSSpec
	have  layer.Picture
}

// ownPins is where this process, and no other, sees a bpf file system of its own.
const ownPins = "/sys/fs/bpf"

func newNames(spec bench.DNSSpec) (*namesServer, error) {
	n := &namesServer{layer: dns.New(dns.Settings{Zone: spec.Zone, Netns: spec.NetNS, Pins: ownPins + "/dns"}), spec: spec}
	return n, mountOwnPins()
}

// mountOwnPins makes the bpf file system of a process with mounts of its own.
func mountOwnPins() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("bpf", ownPins, "bpf", 0, "mode=700"); err != nil {
		return fmt.Errorf("mount a bpf file system: %w", err)
	}
	return nil
}

// begin has the names in force, and the agent there until ctx ends.
func (n *namesServer) begin(ctx context.Context) error {
	if err := n.layer.Open(); err != nil {
		return err
	}
	var err error
	if n.have, err = n.layer.Read(); err != nil {
		return err
	}
	if err := n.apply(); err != nil {
		return err
	}
	if err := errors.Join(n.layer.Settle(), n.layer.Learn(n.outside())); err != nil {
		return err
	}
	changed := make(chan struct{}, 1)
	go func() {
		_ = n.layer.Watch(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	}()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
			}
			if err := n.refresh(); err != nil {
				fmt.Fprintln(os.Stderr, err) // the benchmark says it when this ends
			}
		}
	}()
	return nil
}

// refresh looks at the pods again, and at their search lists.
func (n *namesServer) refresh() (err error) {
	if n.have, err = n.layer.Refresh(n.have); err != nil {
		return err
	}
	return n.apply()
}

func (n *namesServer) apply() (err error) {
	want := n.layer.Plan(n.snapshot())
	n.have, _, err = n.layer.Apply(n.have, want, n.layer.Diff(n.have, want, true))
	return err
}

// outside are the names of others, known for longer than a benchmark lasts.
func (n *namesServer) outside() (all []model.Outside) {
	until := time.Now().Add(24 * time.Hour)
	for name, address := range n.spec.Outside {
		all = append(all, model.Outside{
			Name: name,
			A:    model.Known{State: model.KnownAddresses, Addresses: []netip.Addr{address}, Until: until},
			AAAA: model.Known{State: model.KnownNoData, Until: until},
		})
	}
	return all
}

// snapshot is the cluster: its Services, and that for DNS.
func (n *namesServer) snapshot() *model.Snapshot {
	snapshot := &model.Snapshot{Number: 1, Complete: true, Named: true}
	add := func(name model.Name, address netip.Addr) {
		snapshot.Services = append(snapshot.Services, &model.Service{
			Name: name, Type: model.ClusterIP, ClusterIPs: []netip.Addr{address},
			Ports: []model.ServicePort{{Name: "dns", Protocol: model.UDP, Port: 53}},
		})
	}
	add(dns.DefaultService, n.spec.Service)
	for _, name := range slices.Sorted(maps.Keys(n.spec.Services)) {
		parts := strings.Split(name, ".")
		add(model.Name{Namespace: parts[1], Name: parts[0]}, n.spec.Services[name])
	}
	return snapshot
}
