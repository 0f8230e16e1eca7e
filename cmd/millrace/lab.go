package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/lab"
	"github.com/millrace/millrace/layer"
	"github.com/millrace/millrace/layer/service"
	"github.com/millrace/millrace/source/dir"
)

func labCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "lab",
		Short: "A cluster of network namespaces on this machine, from real manifests",
		Long: inOwnSpaces + `

A lab is a cluster in a box: nodes and pods are network namespaces, and behind
every containerPort a small server says which pod answered. Images are not run.
Services that name no ipFamilies get both (PreferDualStack).`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			return usage("say what to do: up, status, exec, scale, kill, replace, down, list or faults")
		},
	}
	c.AddCommand(labUpCommand(s), labStatusCommand(s), labExecCommand(), labScaleCommand(s), labKillCommand(s),
		labReplaceCommand(s), labDownCommand(s), labListCommand(s), labFaultsCommand(s))
	return c
}

func flagLab(c *cobra.Command, name *string) {
	c.Flags().StringVar(name, "name", "lab", "which lab")
}

// labWish is what `lab up` was asked for.
type labWish struct {
	name, manifests string
	nodes           int
	// path is the agents' setting.
	path string
}

// mostNodes is what the lab's address range for nodes holds.
const mostNodes = 200

func (w *labWish) flags(c *cobra.Command) {
	c.Flags().StringVarP(&w.manifests, "filename", "f", "", "file or folder of manifests (required)")
	c.Flags().IntVar(&w.nodes, "nodes", 3, "how many nodes, where the manifests hold no Node")
	w.flagPath(c)
	flagLab(c, &w.name)
}

func (w *labWish) flagPath(c *cobra.Command) {
	c.Flags().StringVar(&w.path, "path", string(service.PathSocket), "the agents' setting: socket or packet")
}

// up starts the lab's own process and waits until everything is ready.
func (w *labWish) up(ctx context.Context, p *progress) error {
	if w.manifests == "" {
		return usage("-f is missing: say which manifests")
	}
	if w.nodes < 1 || w.nodes > mostNodes {
		return usage("--nodes %d: use 1 to %d", w.nodes, mostNodes)
	}
	if _, err := service.ParsePath(w.path); err != nil {
		return usage("--path: %v", err)
	}
	path, err := filepath.Abs(w.manifests)
	if err != nil {
		return err
	}
	if _, err := checked(dir.Open(path)); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	argv := []string{self, labRunWord, "-f", path, "--nodes", strconv.Itoa(w.nodes), "--path", w.path, "--name", w.name}
	err = lab.Start(ctx, argv, p.say)
	if err == nil {
		err = w.awaitNodes(ctx, p)
	}
	p.done()
	return err
}

// nodesPatience is how long nodes may lack what is published, when all pods and agents
// are ready: on a busy machine it takes a second.
const nodesPatience = 30 * time.Second

// awaitNodes waits until the Services of all that is published are in force on every
// node, and the packet path, where it serves, is at every pod's device: pods and agents
// become ready side by side. What the kernel does not take never comes: that is told.
func (w *labWish) awaitNodes(ctx context.Context, p *progress) error {
	client, err := lab.Dial(w.name)
	if err != nil {
		return err
	}
	for begun := time.Now(); ; {
		status, err := client.Status(ctx)
		if err != nil {
			return err
		}
		behind, err := w.behind(ctx, status)
		if behind == "" || err != nil {
			return err
		}
		if time.Since(begun) > nodesPatience {
			p.say("gone on after " + nodesPatience.String() + ", though " + behind)
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the lab: %s: %w", behind, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// behind names a node that lacks something yet; empty if there is none.
func (w *labWish) behind(ctx context.Context, status *lab.Status) (string, error) {
	pods := map[string]int{}
	for _, pod := range status.Pods {
		pods[pod.Node]++
	}
	for _, node := range status.Nodes {
		if w.path == string(service.PathPacket) {
			devices, err := devicesServed(ctx, node)
			if err != nil {
				return "", err
			}
			if devices < pods[node.Node] {
				return fmt.Sprintf("the packet path is at %d of %d pods of node %s", devices, pods[node.Node], node.Node), nil
			}
		}
		missing, err := w.notInForce(ctx, node)
		if err != nil {
			return "", err
		}
		if len(missing) > 0 {
			return fmt.Sprintf("node %s lacks %d changes: %s", node.Node, len(missing), missing[0]), nil
		}
	}
	return "", nil
}

// devicesServed is at how many pods' devices of a node the packet path is.
func devicesServed(ctx context.Context, node lab.NodeStatus) (devices int, err error) {
	var a agent.Status
	if err := agent.Ask(ctx, node.RunFolder, "/status", &a); err != nil {
		return 0, err
	}
	for _, l := range a.Layers {
		devices += len(devicesOf(l)[fromPodProgram])
	}
	return devices, nil
}

// notInForce are the changes that lead from what a node's kernel has of Services to
// what is published.
func (w *labWish) notInForce(ctx context.Context, node lab.NodeStatus) (missing layer.Changes, err error) {
	snapshot, err := firstSnapshot(ctx, &wishes{source: "dir:" + node.ClusterFolder}, node.Node)
	if err != nil {
		return nil, err
	}
	at := place{cgroup: node.Cgroup, pins: node.BPFFolder, run: node.RunFolder, node: node.Node, path: w.path,
		conntrack: string(service.ConntrackAuto), wire: true}
	for _, l := range at.pinned() {
		if _, serves := l.(layer.Server); !serves {
			continue
		}
		have, err := l.Look()
		if err != nil {
			return nil, err
		}
		missing = append(missing, l.Diff(have, l.Plan(snapshot), true)...)
	}
	return missing, nil
}

// fromPodProgram is the program at every pod's device that the packet path serves.
const fromPodProgram = "from_pod"

func labUpCommand(s *settings) *cobra.Command {
	var wish labWish
	c := command(&cobra.Command{
		Use:   "up -f FILE|DIR",
		Short: "Bring manifests alive; returns when every pod is ready",
		Long: `
The lab goes on in the background and follows changes of the manifests. Readiness
probes are not run: a pod is ready when its servers listen.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		if err := wish.up(ctx, newProgress()); err != nil {
			return err
		}
		client, err := lab.Dial(wish.name)
		if err != nil {
			return err
		}
		return showLab(ctx, s, client)
	}, exitFindings, exitData, exitPrivilege)
	wish.flags(c)
	return c
}

// labRunCommand is the lab's own process.
func labRunCommand() *cobra.Command {
	var wish labWish
	c := command(&cobra.Command{Use: labRunWord, Hidden: true, Short: "The process of a lab"}, inOwnSpaces,
		func(ctx context.Context, _ []string) error {
			source, err := dir.Open(wish.manifests)
			if err != nil {
				return err
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			err = lab.Daemon(ctx, lab.Config{
				Name: wish.name, Nodes: wish.nodes, Watch: source.Run,
				Store: func(folder string) (lab.Store, error) { return dir.NewWriter(folder) },
				AgentCommand: func(n lab.NodeInfo) []string {
					return []string{self, "agent", "--source", "dir:" + n.ClusterFolder, "--node", n.Node, "--path", wish.path,
						"--cgroup", n.Cgroup, "--pins", n.BPFFolder, "--run", n.RunFolder}
				},
				PodCommand: []string{self, podWord},
			})
			if err != nil {
				return &failure{statusOf(&ran{err}), errors.New("")} // Start has told it
			}
			return nil
		})
	wish.flags(c)
	return c
}

func labStatusCommand(s *settings) *cobra.Command {
	var name string
	c := command(&cobra.Command{Use: "status", Short: "Nodes, pods and Services of a lab"}, readsOnly,
		func(ctx context.Context, _ []string) error {
			client, err := lab.Dial(name)
			if err != nil {
				return err
			}
			return showLab(ctx, s, client)
		}, exitFindings)
	flagLab(c, &name)
	return c
}

func showLab(ctx context.Context, s *settings, client *lab.Client) error {
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if s.json() {
		err = printJSON(status)
	} else {
		printLab(status)
	}
	if err == nil && (!status.Up || len(status.Problems) > 0) {
		return &failure{exitFindings, fmt.Errorf("lab %s: up %v, %d problems", status.Name, status.Up, len(status.Problems))}
	}
	return err
}

func printLab(status *lab.Status) {
	fmt.Printf("%s  pid %d  pods %s  services %s\n\n", bold("lab "+status.Name), status.Pid,
		texts(status.Ranges.Pods[:]...), texts(status.Ranges.Services[:]...))
	t := newTable(os.Stdout, "NODE", "ADDRESSES", "PODS", "AGENT")
	for _, n := range status.Nodes {
		agent := "none"
		if n.Agent != nil {
			agent = fmt.Sprintf("pid %d, ready %v, %d restarts", n.Agent.Pid, n.Agent.Ready, n.Agent.Restarts)
		}
		t.row(n.Node, texts(n.Addresses...), fmt.Sprint(podsOn(status, n.Node)), agent)
	}
	t.print()
	fmt.Println()
	t = newTable(os.Stdout, "POD", "NODE", "ADDRESSES", "PORTS", "STATE")
	for _, p := range status.Pods {
		t.row(p.String(), p.Node, texts(p.Addresses...), strings.Join(p.Ports, ","), podState(p))
	}
	t.print()
	fmt.Println()
	t = newTable(os.Stdout, "SERVICE", "ADDRESSES", "PORT", "ENDPOINTS")
	for _, service := range status.Services {
		for _, port := range service.Ports {
			addresses := texts(service.ClusterIPs...)
			if service.Headless {
				addresses = "headless"
			}
			t.row(service.Namespace+"/"+service.Name, addresses, fmt.Sprintf("%d/%s", port.Port, port.Protocol), endpointsText(port))
		}
	}
	t.print()
	for _, p := range status.Problems {
		fmt.Println(red("problem"), p.Error())
	}
}

func podsOn(status *lab.Status, node string) int {
	n := 0
	for _, p := range status.Pods {
		if p.Node == node {
			n++
		}
	}
	return n
}

func podState(p lab.PodStatus) string {
	switch {
	case p.Terminating:
		return "leaving"
	case p.Ready:
		return green("ready")
	}
	return red("not ready")
}

func endpointsText(port lab.PortStatus) string {
	ready := 0
	for _, e := range port.Endpoints {
		if e.Ready {
			ready++
		}
	}
	return fmt.Sprintf("%d ready of %d", ready, len(port.Endpoints))
}

// texts joins what prints itself.
func texts[T fmt.Stringer](values ...T) string {
	words := make([]string, len(values))
	for i, v := range values {
		words[i] = v.String()
	}
	return orDash(strings.Join(words, " "))
}

func labExecCommand() *cobra.Command {
	var name string
	c := command(&cobra.Command{
		Use:   "exec POD|NODE -- COMMAND [ARGUMENT...]",
		Short: "Run a command as the pod would: its network namespace, its cgroup",
		Long: `
POD is namespace/name, a name in the namespace default, or the beginning of one.
The output is the command's own, also with -o json, and so is the exit status.`,
		Args: func(c *cobra.Command, args []string) error {
			if len(args) < 2 || c.ArgsLenAtDash() != 1 {
				return usage("exec: say POD -- COMMAND")
			}
			return nil
		},
	}, inOwnSpaces, func(_ context.Context, args []string) error {
		return lab.Exec(name, args[0], args[1:])
	}, exitPrivilege)
	flagLab(c, &name)
	return c
}

func labScaleCommand(s *settings) *cobra.Command {
	var name string
	c := command(&cobra.Command{
		Use: "scale WORKLOAD N", Short: "Give a workload N pods", Args: cobra.ExactArgs(2),
		Long: "WORKLOAD is name, namespace/name or kind/namespace/name. Holds until its manifest says another number.",
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		n, err := strconv.Atoi(args[1])
		if err != nil || n < 0 {
			return usage("scale: %q is no number of pods", args[1])
		}
		return withLab(name, func(client *lab.Client) error {
			err := client.Scale(ctx, args[0], n)
			return said(s, err, done{Lab: name, Workload: args[0], Pods: &n})
		})
	})
	flagLab(c, &name)
	return c
}

func labKillCommand(s *settings) *cobra.Command {
	var name string
	c := command(&cobra.Command{
		Use: "kill POD", Short: "Kill a pod at once, without a drain; its workload makes a new one", Args: cobra.ExactArgs(1),
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		return withLab(name, func(client *lab.Client) error {
			killed, err := client.Kill(ctx, args[0])
			return said(s, err, done{Lab: name, Killed: killed})
		})
	})
	flagLab(c, &name)
	return c
}

func labReplaceCommand(s *settings) *cobra.Command {
	var name string
	c := command(&cobra.Command{
		Use: "replace POD", Short: "Put a new pod in a pod's place; the old one drains", Args: cobra.ExactArgs(1),
	}, inOwnSpaces, func(ctx context.Context, args []string) error {
		return withLab(name, func(client *lab.Client) error {
			made, err := client.Replace(ctx, args[0])
			return said(s, err, done{Lab: name, Ready: made})
		})
	})
	flagLab(c, &name)
	return c
}

// done is what a command did to a lab, for machines.
type done struct {
	Lab      string `json:"lab"`
	Workload string `json:"workload,omitempty"`
	Pods     *int   `json:"pods,omitempty"`
	Killed   string `json:"killed,omitempty"`
	Ready    string `json:"ready,omitempty"`
	Down     bool   `json:"down,omitempty"`
}

func said(s *settings, err error, d done) error {
	switch {
	case err != nil:
		return err
	case s.json():
		return printJSON(d)
	case d.Killed != "":
		fmt.Println("killed", d.Killed)
	case d.Ready != "":
		fmt.Println("ready:", d.Ready)
	}
	return nil
}

func withLab(name string, do func(*lab.Client) error) error {
	client, err := lab.Dial(name)
	if err != nil {
		return err
	}
	return do(client)
}

func labDownCommand(s *settings) *cobra.Command {
	var name string
	c := command(&cobra.Command{
		Use: "down", Short: "Remove a lab, also one that was killed half-way",
	}, inOwnSpaces, func(context.Context, []string) error {
		p := newProgress()
		err := lab.Down(name, p.say)
		p.done()
		return said(s, err, done{Lab: name, Down: true})
	}, exitPrivilege)
	flagLab(c, &name)
	return c
}

func labListCommand(s *settings) *cobra.Command {
	return command(&cobra.Command{Use: "list", Short: "The labs of this machine"}, readsOnly,
		func(context.Context, []string) error {
			names, err := lab.List()
			if err != nil {
				return err
			}
			if s.json() {
				return printJSON(map[string][]string{"labs": append([]string{}, names...)})
			}
			for _, name := range names {
				fmt.Println(name)
			}
			return nil
		})
}
