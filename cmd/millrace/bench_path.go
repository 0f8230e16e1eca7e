package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/pod"
	"github.com/millrace/millrace/layer/pod/cni"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/model"
)

func benchPathCommand(s *settings) *cobra.Command {
	var options bench.PathOptions
	c := command(&cobra.Command{
		Use:   "path",
		Short: "What goes between pods, of one node and of two, past the stack and through it",
		Long: `
Packets, requests, connections, UDP and streams between two pods: of one node by its
stack, by a bridge and past the stack; of two nodes on one segment by routes of their
stacks, by the kernel's VXLAN with routes as flannel has them, past the stacks, and in
VXLAN written by eBPF; and connections to a Service's address. Pods of millrace have
their network from its CNI plugin, and the layers are those of the agent. All have their
turn in every round, in random order, on one core; a ratio is that to another way in the
same round. Every UDP packet must arrive.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		p := newProgress()
		options.Progress = p
		options.Attach = map[string]bench.PathAttach{}
		for _, variant := range []string{bench.MillraceDirect, bench.MillraceVXLAN, bench.MillraceClusterIP, bench.SameMillrace, bench.SameClusterIP} {
			options.Attach[variant] = attachPath
		}
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

// attachPath starts the process that serves pods, routes and perhaps a Service.
func attachPath(spec bench.PathSpec) (func() error, error) {
	s, err := startApart("path", spec)
	if err != nil {
		return nil, err
	}
	return s.close, nil
}

// servePath has a way between two pods in force until its input ends.
func servePath(in io.Reader, out io.Writer) error {
	p := &pathServer{}
	err := serveUntilEnd(in, out, &p.spec, p.open)
	for _, l := range p.layers {
		err = errors.Join(err, l.Close())
	}
	return err
}

// pathServer is what an agent does, on each of the nodes.
type pathServer struct {
	spec   bench.PathSpec
	layers []layer.Layer
	pods   [2]netip.Addr
}

func (p *pathServer) open() error {
	if err := mountOwnPins(); err != nil {
		return err
	}
	cluster := &model.Snapshot{Number: 1, Complete: true}
	for i := range p.spec.Nodes {
		cluster.Nodes = append(cluster.Nodes, &model.Node{Name: fmt.Sprintf("n%d", i+1), Addresses: []netip.Addr{p.spec.Addresses[i]}, PodCIDRs: []netip.Prefix{p.spec.Ranges[i]}})
	}
	for i := range p.spec.Nodes {
		if err := p.openNode(i, cluster); err != nil {
			return err
		}
	}
	if !p.spec.Service.IsValid() {
		return nil
	}
	backend := model.Backend{Address: netip.AddrPortFrom(p.pods[1], p.spec.Port), Ready: true, Serving: true}
	cluster.Services = []*model.Service{{Name: model.Name{Namespace: "bench", Name: "server"}, Type: model.ClusterIP, IPv4: true, ClusterIPs: []netip.Addr{p.spec.Service.Addr()},
		Ports: []model.ServicePort{{Name: "http", Protocol: model.TCP, Port: p.spec.Service.Port(), TargetPort: p.spec.Port, Backends: []model.Backend{backend}}}}}
	return p.begin(service.New(service.Settings{Cgroup: p.spec.Cgroup}), cluster)
}

// openNode gives the pods of a node their networks, and the node its routes. Whose pods
// are where the layer of routes reads in the map of that of pods.
func (p *pathServer) openNode(i int, cluster *model.Snapshot) error {
	name, run := cluster.Nodes[i].Name, fmt.Sprintf("%s/n%d", ownPins, i+1)
	if err := errors.Join(os.Mkdir(run, 0o700), unix.Mount("tmpfs", run, "tmpfs", 0, "mode=700")); err != nil {
		return fmt.Errorf("mount a file system for %s: %w", name, err)
	}
	pins := fmt.Sprintf("%s/pod%d", ownPins, i+1)
	pods := pod.New(pod.Settings{Node: name, Netns: p.spec.Nodes[i], Folder: run, Socket: run + "/cni.sock", Pins: pins})
	if err := p.begin(pods, cluster); err != nil {
		return err
	}
	for j, space := range p.spec.Pods {
		if min(j, len(p.spec.Nodes)-1) != i {
			continue
		}
		if err := p.addPod(pods, j, space); err != nil {
			return err
		}
	}
	if err := putInForce(pods, cluster); err != nil { // the shortcuts to them
		return err
	}
	mode := route.ModeAuto
	if p.spec.Variant == bench.MillraceVXLAN {
		mode = route.ModeVXLAN
	}
	return p.begin(route.New(route.Settings{Node: name, Mode: mode, Netns: p.spec.Nodes[i], Homes: pins + "/" + pod.Homes, Pins: fmt.Sprintf("%s/route%d", ownPins, i+1)}), cluster)
}

// addPod asks for a pod's network as a runtime does.
func (p *pathServer) addPod(pods *pod.Layer, j int, space string) error {
	file, err := os.Open(space)
	if err != nil {
		return fmt.Errorf("open namespace: %w", err)
	}
	defer file.Close()
	result, err := pods.Answer(context.Background(), &cni.Request{Command: cni.Add, Container: fmt.Sprintf("pod%d", j), Interface: "eth0", Space: space, Namespace: file,
		Config: []byte(`{"cniVersion":"1.1.0","name":"bench","type":"millrace"}`)})
	if err != nil {
		return err
	}
	for _, ip := range result.IPs {
		addr, _ := netip.AddrFromSlice(ip.Address.IP)
		p.pods[j] = addr.Unmap()
	}
	return nil
}

func (p *pathServer) begin(l layer.Layer, cluster *model.Snapshot) error {
	if err := l.Open(); err != nil {
		return err
	}
	p.layers = append(p.layers, l)
	return putInForce(l, cluster)
}

// putInForce applies a cluster to a layer, as an agent does.
func putInForce(l layer.Layer, cluster *model.Snapshot) error {
	have, err := l.Read()
	if err != nil {
		return err
	}
	want := l.Plan(cluster)
	if _, _, err := l.Apply(have, want, l.Diff(have, want, true)); err != nil {
		return err
	}
	return l.Settle()
}
