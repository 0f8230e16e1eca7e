package layertest

import (
	"fmt"
	"strings"
)

// PortMappings is the part of a plug-in's configuration by which a runtime asks for
// hostPorts, "8080:80/tcp" each, or "127.0.0.1 8080:80/tcp".
func PortMappings(ports ...string) string {
	var all []string
	for _, text := range ports {
		host, rest, found := strings.Cut(text, " ")
		if !found {
			host, rest = "", text
		}
		numbers, protocol, _ := strings.Cut(rest, "/")
		from, to, _ := strings.Cut(numbers, ":")
		all = append(all, fmt.Sprintf(`{"hostPort":%s,"containerPort":%s,"protocol":%q,"hostIP":%q}`, from, to, protocol, host))
	}
	return `,"runtimeConfig":{"portMappings":[` + strings.Join(all, ",") + "]}"
}
