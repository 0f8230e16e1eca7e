package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/bench"
	"github.com/millrace/millrace/examples"
	"github.com/millrace/millrace/lab"
)

// demonstration is what the demo shows, and its JSON form.
type demonstration struct {
	OK          bool          `json:"ok"`
	UpSeconds   float64       `json:"up_seconds"`
	Pods        int           `json:"pods"`
	Services    int           `json:"services"`
	Matrix      *matrix       `json:"matrix"`
	Replacement *trial        `json:"replacement"`
	AgentKills  *trial        `json:"agent_kills"`
	Agents      []agentFigure `json:"agents"`
	Bench       *bench.Report `json:"bench,omitempty"`
}

func demoCommand(s *settings) *cobra.Command {
	wish := labWish{name: fmt.Sprintf("demo-%d", os.Getpid())}
	var window time.Duration
	var kills, rounds int
	c := command(&cobra.Command{
		Use:   "demo",
		Short: "The whole story in three minutes: a shop comes alive, is shaken, and is measured",
		Long: `
Brings a shop of sixteen Services up on three nodes made of network namespaces;
lets every pod call every Service; replaces endpoints under load and kills the
agents, counting failures; measures a connection beside iptables and nftables;
and removes everything. With -f it takes your manifests instead of the shop.`,
	}, inOwnSpaces, func(ctx context.Context, _ []string) error {
		p := newProgress()
		story := &demonstration{OK: true}
		err := story.play(ctx, &wish, p, s, window, kills)
		if err == nil && rounds > 0 {
			err = story.measure(ctx, p, s, rounds)
		}
		story.OK = story.OK && err == nil
		if s.json() {
			err = errors.Join(err, printJSON(story))
		}
		if err == nil && !story.OK {
			return &failure{exitFindings, errors.New("the demo met failures: they are listed above")}
		}
		return err
	}, exitFindings, exitData, exitUnavailable, exitPrivilege)
	c.Flags().StringVarP(&wish.manifests, "filename", "f", "", "file or folder of manifests instead of the example shop")
	c.Flags().IntVar(&wish.nodes, "nodes", 3, "how many nodes, where the manifests hold no Node")
	wish.flagPath(c)
	flagFor(c, &window, 30*time.Second, "how long endpoints are replaced under load")
	c.Flags().IntVar(&kills, "kills", 20, "how often an agent is killed with SIGKILL")
	c.Flags().IntVar(&rounds, "rounds", 30, "how often each variant has its turn when a connection is measured; 0 leaves that out")
	return c
}

// play is the part in the lab.
func (d *demonstration) play(ctx context.Context, wish *labWish, p *progress, s *settings, window time.Duration, kills int) (err error) {
	if wish.manifests == "" {
		folder, err := os.MkdirTemp("", "millrace-demo-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(folder)
		wish.manifests = filepath.Join(folder, "shop.yaml")
		if err := os.WriteFile(wish.manifests, examples.Shop, 0o600); err != nil {
			return err
		}
	}
	begun := time.Now()
	if err := wish.up(ctx, p); err != nil {
		return err // what was begun is removed already
	}
	defer func() {
		err = errors.Join(err, lab.Down(wish.name, p.say))
		p.done()
	}()
	d.UpSeconds = time.Since(begun).Seconds()
	client, err := lab.Dial(wish.name)
	if err != nil {
		return err
	}
	status, err := client.Status(ctx)
	if err != nil {
		return err
	}
	d.Pods, d.Services = len(status.Pods), len(status.Services)
	d.tell(s, "%d pods and %d Services on %d nodes, up in %.1f s", d.Pods, d.Services, len(status.Nodes), d.UpSeconds)
	for _, problem := range status.Problems {
		d.tell(s, "problem: %s", problem.Error())
	}
	if d.Matrix, err = callEverything(ctx, client, p); err != nil {
		return err
	}
	d.show(s, d.Matrix.print, d.Matrix.Failed == 0 && d.Matrix.Calls > 0)
	if d.Replacement, err = replaceUnderLoad(ctx, client, p, window); err != nil {
		return err
	}
	d.show(s, d.Replacement.print, d.Replacement.ok())
	if d.Agents, err = agentFigures(ctx, client); err != nil {
		return err
	}
	d.show(s, func() { printAgents(d.Agents) }, true)
	if d.AgentKills, err = killAgents(ctx, client, p, kills); err != nil {
		return err
	}
	d.show(s, d.AgentKills.print, d.AgentKills.ok())
	return nil
}

func (d *demonstration) measure(ctx context.Context, p *progress, s *settings, rounds int) error {
	report, err := bench.Services(ctx, bench.Options{Services: []int{10, 1000}, Rounds: rounds, Attach: attachers(), Progress: p})
	p.done()
	if err != nil {
		return err
	}
	d.Bench = report
	d.OK = d.OK && !report.Failed()
	if s.json() {
		return nil
	}
	fmt.Println()
	return report.WriteTable(os.Stdout)
}

func (d *demonstration) tell(s *settings, format string, args ...any) {
	if !s.json() {
		fmt.Printf(format+"\n", args...)
	}
}

func (d *demonstration) show(s *settings, print func(), ok bool) {
	d.OK = d.OK && ok
	if !s.json() {
		fmt.Println()
		print()
	}
}
