package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/kernel/kubeproxy"
	"github.com/millrace/millrace/kernel/nft"
)

func kubeProxyCommand(s *settings) *cobra.Command {
	c := &cobra.Command{
		Use:   "kube-proxy",
		Short: "Move over from a kube-proxy",
		Long: replacesOther + `

For a node on which millrace has taken a kube-proxy's place.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return usage("say what to do: remove") },
	}
	c.AddCommand(kubeProxyRemoveCommand(s))
	return c
}

func kubeProxyRemoveCommand(s *settings) *cobra.Command {
	var at place
	var dryRun bool
	c := command(&cobra.Command{
		Use:   "remove",
		Short: "Take a kube-proxy's rules out of this host",
		Long: `
Removes the tables of a kube-proxy in mode nftables, and its chains from the
tables of iptables-nft, in this network namespace, all in one step, and names
them. Rules of others stay. Connections that its rules have translated go on: a
table inet millrace-hold keeps the kernel's translation while there are any;
run this again, then that goes too.
Rules of iptables-legacy and of IPVS are named and left (exit status 2).
Stop kube-proxy first, and have an agent run here. Needs CAP_NET_ADMIN.`,
	}, replacesOther, func(ctx context.Context, _ []string) error {
		return kubeProxyRemove(ctx, s, &at, dryRun)
	}, exitFindings, exitPrivilege)
	at.flagRun(c)
	c.Flags().BoolVar(&dryRun, "dry-run", false, "print what would be removed and remove nothing")
	return c
}

// removedRules is what the command says.
type removedRules struct {
	Removed []removedPart `json:"removed"`
	// Kept are used by rules of others, Left are removed otherwise.
	Kept []removedPart `json:"kept"`
	Left []string      `json:"left"`
	// Connections are translated and go on; while there are any, the table
	// inet millrace-hold is there.
	Connections int  `json:"connections"`
	DryRun      bool `json:"dry_run"`
}

type removedPart struct {
	What  string `json:"what"`
	Rules int    `json:"rules"`
}

func kubeProxyRemove(ctx context.Context, s *settings, at *place, dryRun bool) error {
	found, err := kubeproxy.Find("")
	if err != nil {
		return fmt.Errorf("find kube-proxy's rules: %w", err)
	}
	if !dryRun && len(found.Parts) > 0 {
		if err := maySupersede(ctx, at, found); err != nil {
			return fmt.Errorf("remove kube-proxy's rules: %w", err)
		}
	}
	said := removedRules{Removed: partsOf(found.Parts), Kept: partsOf(found.Kept), Left: found.Left,
		Connections: found.Connections, DryRun: dryRun}
	if !dryRun {
		if said.Connections, err = kubeproxy.Remove("", found); err != nil {
			return fmt.Errorf("remove kube-proxy's rules: %w", err)
		}
	}
	if s.json() {
		err = printJSON(said)
	} else {
		said.print(found)
	}
	if err == nil && len(said.Left)+len(said.Kept) > 0 {
		return &failure{exitFindings, errors.New("")}
	}
	return err
}

// maySupersede refuses to remove what nobody would stand in for, or what would be
// written again.
func maySupersede(ctx context.Context, at *place, found kubeproxy.Found) error {
	if found.Process != 0 {
		return fmt.Errorf("kube-proxy runs here (process %d), and would write them again: stop it first, "+
			"as with `kubectl -n kube-system delete daemonset kube-proxy`", found.Process)
	}
	var status agent.Status
	if err := agent.Ask(ctx, at.run, "/status", &status); err != nil {
		return fmt.Errorf("nobody would serve Services: %w: start an agent first", err)
	}
	if !status.Ready {
		return errors.New("the agent is not ready, so that some Services would not be served: see `millrace status`")
	}
	return nil
}

func (r *removedRules) print(found kubeproxy.Found) {
	for _, p := range r.Removed {
		fmt.Printf("- %s%s\n", p.What, rulesText(p.Rules))
	}
	for _, p := range r.Kept {
		fmt.Fprintf(os.Stderr, "kept, for rules of others lead there: %s%s\n", p.What, rulesText(p.Rules))
	}
	for _, what := range r.Left {
		fmt.Fprintln(os.Stderr, "left:", what)
	}
	switch {
	case r.Connections > 0 && r.DryRun:
		fmt.Fprintf(os.Stderr, "%d connections are translated now, by these rules or others'; they would go on, kept by table inet %s\n", r.Connections, nft.HoldTable)
	case r.Connections > 0:
		fmt.Fprintf(os.Stderr, "%d connections are translated and go on, kept by table inet %s: run this again when they have ended\n", r.Connections, nft.HoldTable)
	case found.Held && r.DryRun:
		fmt.Printf("- table inet %s\n", nft.HoldTable)
	case found.Held:
		fmt.Printf("- table inet %s, for no connection is translated any more\n", nft.HoldTable)
	case len(r.Removed)+len(r.Kept)+len(r.Left) == 0:
		fmt.Fprintln(os.Stderr, "nothing of kube-proxy is here")
	}
}

func rulesText(rules int) string {
	switch rules {
	case 0:
		return ""
	case 1:
		return ", 1 rule"
	}
	return fmt.Sprintf(", %d rules", rules)
}

// partsOf says what parts are, in their order; chains that are there for each
// Service or endpoint, "KUBE-SVC-...", are said by their number.
func partsOf(parts []nft.Part) []removedPart {
	said := []removedPart{}
	many := map[string]int{} // where in said, by what they are
	counts := map[string]int{}
	for _, p := range parts {
		words := strings.SplitN(p.Chain, "-", 3)
		if p.Jump != "" || len(words) < 3 || !slices.Contains(numbered, words[1]) {
			rules := p.Rules
			if p.Jump != "" {
				rules = 0 // it is one
			}
			said = append(said, removedPart{p.String(), rules})
			continue
		}
		what := fmt.Sprintf("chains %s %s KUBE-%s-*", p.Family, p.Table, words[1])
		at, there := many[what]
		if !there {
			at = len(said)
			many[what] = at
			said = append(said, removedPart{})
		}
		counts[what]++
		said[at].What = fmt.Sprintf("%s: %d", what, counts[what])
		said[at].Rules += p.Rules
	}
	return said
}

// numbered are the second words of chains' names that there are many of.
var numbered = []string{"SVC", "SVL", "SEP", "EXT", "FW", "XLB"}
