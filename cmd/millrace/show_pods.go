package main

import (
	"context"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/millrace/millrace/layer/pod"
)

func showPods(s *settings) *cobra.Command {
	var at place
	c := command(&cobra.Command{
		Use:   podsWord,
		Short: "Pods of this node that were given their network here",
		Long: `
Reads the run folder, the node's devices and the pinned maps, so that it works without an
agent. WAY is how packets of other pods of the node come: direct, by the device, where
somebody looks at what it sends, or through the host's stack. BANDWIDTH is what the pod's
annotations let it receive and send, in bits a second. PORTS are those of the node that lead
to it (hostPort). Needs CAP_BPF or CAP_SYS_ADMIN.`,
	}, readsOnly, func(context.Context, []string) error {
		picture, err := at.network().Look()
		if err != nil {
			return err
		}
		pods := append([]*pod.Pod{}, picture.(*pod.Picture).Pods()...)
		if s.json() {
			return printJSON(map[string]any{"pods": pods})
		}
		t := newTable(os.Stdout, "POD", "ADDRESSES", "DEVICE", "WAY", "BANDWIDTH", "CONTAINER", "PORTS")
		for _, one := range pods {
			var addresses, ports []string
			for _, addr := range one.Addresses {
				addresses = append(addresses, addr.String())
			}
			for _, port := range one.Ports {
				ports = append(ports, port.String())
			}
			t.row(orDash(one.Pod), strings.Join(addresses, ", "), one.Device, one.Way, orDash(one.Bandwidth.String()),
				one.Container[:min(len(one.Container), 12)], // as crictl shows it
				orDash(strings.Join(ports, ", ")))
		}
		return t.print()
	}, exitPrivilege)
	at.flagPins(c)
	at.flagRun(c)
	return c
}
