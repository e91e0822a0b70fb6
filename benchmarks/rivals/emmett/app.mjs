// Orders by Emmett's rebuild. `node app.mjs store` makes its tables, `node app.mjs` projects.
import { SQL, literal } from "@event-driven-io/dumbo";
import {
  getPostgreSQLEventStore,
  postgreSQLRawBatchSQLProjection,
  rebuildPostgreSQLProjections,
} from "@event-driven-io/emmett-postgresql";

const connectionString = process.env.DSN;

if (process.argv[2] === "store") {
  const store = getPostgreSQLEventStore(connectionString);
  await store.schema.migrate();
  await store.close();
} else {
  // Text, field, text, field, … text.
  const parts = process.env.UPSERT.split(/<(\w+)>/);
  const texts = parts.filter((_, place) => place % 2 === 0);
  const fields = parts.filter((_, place) => place % 2 === 1);
  const valueOf = (data, field) =>
    literal(field === "payload" ? JSON.stringify(data.payload) : data[field]);
  const orders = postgreSQLRawBatchSQLProjection({
    name: "orders",
    canHandle: process.env.TYPES.split(","),
    evolve: (events) =>
      events.map(({ data }) => SQL(texts, ...fields.map((field) => valueOf(data, field)))),
  });
  const consumer = rebuildPostgreSQLProjections({
    connectionString,
    pulling: { batchSize: Number(process.env.BATCH) },
    projections: [orders],
  });
  await consumer.start();
  await consumer.close();
}
